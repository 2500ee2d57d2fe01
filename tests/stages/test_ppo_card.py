"""The model card that ppo writes."""

from types import SimpleNamespace

from stages import ppo


def test_the_card_counts_the_prompts_there_were_and_responses():
    looks = {0: {"validation/score": 0.0}, 2: {"validation/score": 1.5}}
    validation = SimpleNamespace(looks=looks, prompts=[[5]] * 7)
    config = ppo.Config(advantage=ppo.Advantage(estimator="rloo", responses_per_prompt=4))
    card = ppo.card(config, validation, updates=2)
    assert "by 2 PPO updates of\n128 responses" in card
    assert "On 7 validation prompts" in card
    assert "| validation/score | 0.000 | 1.500 |" in card
