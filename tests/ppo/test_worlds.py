"""Worlds whose outcome one can say beforehand: what is learned, and the edges of a response."""

import pytest
import torch

from pipeline.ppo.settings import KL, Optimisation, Reward
from tests.ppo.optimum import EOS, World, fixed
from tests.ppo.worlds import LengthCounter, TokenCounter, trainer, weights

pytestmark = pytest.mark.usefixtures("unchecked")

FREE = {"kl": KL(coef=0.0, controller="fixed"), "updates": 15}
"""No penalty, so that the score alone decides."""


def courses(ppo, *names):
    """Each metric's first and last three updates on average, after all updates."""
    metrics = [ppo.update(number).metrics for number in range(ppo.settings.updates)]
    return [
        (sum(row[name] for row in metrics[:3]) / 3, sum(row[name] for row in metrics[-3:]) / 3)
        for name in names
    ]


def test_counting_a_token_is_learned():
    ppo = trainer(reward_model=TokenCounter(), reward=Reward(missing_eos_score=None), **FREE)
    ((first, last),) = courses(ppo, "objective/score")
    assert last > first + 1.0


@pytest.mark.parametrize("per_token", [1.0, -1.0])
def test_a_score_of_length_makes_responses_longer_or_shorter(per_token):
    world = World(kl=fixed(0.0), reward=Reward(missing_eos_score=None), budget=3, updates=15)
    ppo = world.trainer(reward_model=LengthCounter(per_token))
    ((first, last),) = courses(ppo, "response/length_tokens")
    wanted = 3.0 if per_token > 0 else 1.0
    assert abs(last - wanted) < 0.1 < abs(first - wanted)


def test_a_score_that_comes_through_eos_alone_teaches_to_stop():
    world = World(kl=fixed(0.0), reward=Reward(missing_eos_score=-1.0), budget=3, updates=15)
    ppo = world.trainer(reward_model=LengthCounter(0.0))
    scores, endings = courses(ppo, "objective/score", "response/eos_frac")
    assert scores == (0.0, 0.0)
    assert endings[0] < 0.8
    assert endings[1] > 0.98


def settled(world, *, eos_logit):
    """A trainer whose policy and reference emit EOS always, or never."""
    ppo = world.trainer()
    for model in (ppo.roles.policy, ppo.roles.reference):
        model.numbers.data[..., EOS] = eos_logit
    return ppo


def test_a_generator_that_never_ends_scores_the_missing_eos_everywhere():
    world = World(kl=fixed(1.0), reward=Reward(missing_eos_score=-1.5), budget=3)
    metrics = settled(world, eos_logit=-1e4).update(0).metrics
    assert metrics["response/eos_frac"] == 0.0
    assert metrics["response/length_tokens"] == 3.0
    assert metrics["objective/reward"] == pytest.approx(-1.5, abs=1e-6)
    assert metrics["objective/score"] != pytest.approx(-1.5, abs=0.5)


def test_when_every_response_is_eos_the_policy_has_nothing_to_learn():
    ppo = settled(World(kl=fixed(1.0), budget=3), eos_logit=1e4)
    before = weights(ppo)
    outcome = ppo.update(0)
    assert outcome.experience.responses == [[EOS]] * 128
    assert outcome.metrics["response/eos_frac"] == outcome.metrics["response/length_tokens"] == 1.0
    assert outcome.metrics["objective/entropy"] == outcome.metrics["policy/grad_norm"] == 0.0
    assert outcome.metrics["value/grad_norm"] > 0
    size = ppo.roles.policy.numbers.numel()
    after = weights(ppo)
    assert torch.equal(after[:size], before[:size])
    assert not torch.equal(after[size:], before[size:])


def test_a_larger_penalty_keeps_the_policy_nearer():
    rates = Optimisation(learning_rate=5e-4, value_learning_rate=3e-3, max_grad_norm=10.0)
    distances = []
    for coef in (0.0, 3.0):
        ppo = trainer(
            reward_model=TokenCounter(), updates=8, optimisation=rates,
            kl=KL(coef=coef, controller="fixed"), reward=Reward(missing_eos_score=None),
        )  # fmt: skip
        distances.append([ppo.update(number).metrics["objective/kl"] for number in range(8)][-1])
    assert distances[1] < distances[0] / 2
