"""Options of the update in the real trainer: effect, cut into micro-batches, exact resume."""

import dataclasses
import functools

import pytest
import torch

from pipeline.models import score_responses, take_raw_scores
from pipeline.ppo.experience import Roles, move_reference
from pipeline.ppo.metrics import step_metrics
from pipeline.ppo.settings import KL, Advantage, Optimisation
from tests.ppo.worlds import PAD, PROMPTS, trainer, weights
from tests.support import assert_close, tiny_llama, tiny_reward_model

RATES = Optimisation(learning_rate=3e-3, value_learning_rate=3e-3, epochs=2, max_grad_norm=10.0)
TEXT = torch.randint(2, 24, (9, 10), generator=torch.Generator().manual_seed(0))


def rates(**changes) -> Optimisation:
    return dataclasses.replace(RATES, **changes)


OPTIONS = {
    "rloo": {"advantage": Advantage(estimator="rloo", responses_per_prompt=3)},
    "grpo": {"advantage": Advantage(estimator="grpo", responses_per_prompt=2)},
    "reinforce": {"advantage": Advantage(estimator="reinforce")},
    "k2_in_loss": {"kl": KL(penalty="k2_in_loss", controller="fixed")},
    "k3_in_loss": {"kl": KL(penalty="k3_in_loss", target=0.01, horizon=100.0)},
    "clip_high": {"optimisation": rates(clip=0.02, clip_high=0.04)},
    "dual_clip": {"optimisation": rates(dual_clip=1.01)},
    "entropy": {"optimisation": rates(entropy_coef=0.05)},
    "target_kl": {"optimisation": rates(target_kl=0.002)},
    "ptx": {"optimisation": rates(ptx_coef=0.5), "text": TEXT},
    "synced": {"kl": KL(controller="fixed", reference_rate=1.0)},
    "critic_warmup": {"optimisation": rates(critic_warmup=1)},
    "trunk": {"sharing": "trunk"},
    "lora": {"sharing": "lora"},
    "average": {"kl": KL(controller="fixed", reference_rate=0.3)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_resumes_exactly_and_changes_the_update(name, tmp_path):
    options = OPTIONS[name]
    straight = trainer(**options)
    straight.update(0)
    straight.save(tmp_path)
    straight.update(1)
    resumed = trainer(**options)
    resumed.load(tmp_path, step=straight.steps)
    assert resumed.updates == 1
    resumed.update(1)
    assert_same_state(resumed, straight)
    assert not torch.equal(policy_weights(straight), default_weights())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("taken", [0, 3])
def test_an_update_left_between_two_optimizer_steps_goes_on_exactly(name, taken, tmp_path):
    options = OPTIONS[name]
    straight, left, resumed = (trainer(**options) for _ in range(3))
    whole = [straight.update(0), straight.update(1)]
    left.update(0)
    answers = iter([True] * taken + [False])
    ended = left.update(1, goes_on=lambda: next(answers))
    if ended is not None:  # target_kl ended the update before
        assert name == "target_kl"
        assert next(answers, None) is not None
        return
    left.save(tmp_path)
    assert left.steps == left.settings.steps_per_update + taken
    resumed.load(tmp_path, step=left.steps)
    assert (resumed.updates, resumed.steps) == (1, left.steps)
    again = resumed.update(1, goes_on=lambda: True)
    assert again.metrics == whole[1].metrics
    assert torch.equal(again.rewards, whole[1].rewards)
    assert torch.equal(again.advantages, whole[1].advantages)
    assert again.experience.responses == whole[1].experience.responses
    assert_same_state(resumed, straight)
    assert set(again.timings) == set(whole[1].timings)


def assert_same_state(resumed, straight) -> None:
    """Both trainers are at the same place, to the last bit."""
    assert resumed.updates == straight.updates
    assert resumed.midway is None is straight.midway
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.kl.state() == straight.kl.state()
    assert resumed.baseline == straight.baseline
    for ours, theirs in zip(
        resumed.roles.reference.parameters(), straight.roles.reference.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


@functools.cache
def default_weights() -> torch.Tensor:
    plain = trainer()
    for number in range(2):
        plain.update(number)
    return policy_weights(plain)


def policy_weights(ppo) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in ppo.roles.policy.parameters()])


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cut_into_microbatches_changes_no_option(name):
    whole = trainer(double=True, **OPTIONS[name])
    cut = trainer(double=True, microbatch_size=4, **OPTIONS[name])
    first, second = whole.update(0).metrics, cut.update(0).metrics
    assert_close(weights(cut), weights(whole), tolerance=1e-9)
    assert second == {key: pytest.approx(value, abs=1e-5) for key, value in first.items()}


def test_the_state_of_options_is_really_used():
    reinforce = trainer(**OPTIONS["reinforce"])
    reinforce.update(0)
    assert reinforce.baseline.value != 0.0
    synced = trainer(kl=KL(controller="fixed", reference_rate=1.0, reference_every=2))
    assert synced.update(0).metrics["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert synced.update(1).metrics["objective/kl"] != pytest.approx(0.0, abs=1e-6)
    assert synced.update(2).metrics["objective/kl"] == pytest.approx(0.0, abs=1e-6)


def test_an_update_stops_before_it_goes_too_far():
    ppo, one_step = trainer(optimisation=rates(target_kl=1e-9)), trainer(optimisation=RATES)
    assert ppo.update(0).metrics["optim/steps"] == 1.0
    one_step.optimiser._minibatches = lambda *_, **__: iter([ppo_first_rows(ppo)])
    one_step.update(0)
    assert torch.equal(weights(ppo), weights(one_step))
    far = trainer(optimisation=rates(target_kl=1e9)).update(0).metrics
    assert far["optim/steps"] == 4.0  # two epochs of two minibatches


def test_the_first_step_is_taken_whatever_rounding_makes_of_its_kl(monkeypatch):
    def rounded(*args, **named):
        return {**step_metrics(*args, **named), "policy/approx_kl": 1e-9}

    monkeypatch.setattr("pipeline.ppo.optimiser.step_metrics", rounded)
    metrics = trainer(optimisation=rates(target_kl=1e-10)).update(0).metrics
    assert (metrics["optim/steps"], metrics["policy/first_approx_kl"]) == (1.0, 1e-9)


def ppo_first_rows(ppo) -> torch.Tensor:
    return next(iter(type(ppo.optimiser)._minibatches(ppo.optimiser, 0, size=12)))


def test_ptx_lowers_the_loss_on_its_text_and_reads_each_row_once_per_pass():
    ppo, without = trainer(**OPTIONS["ptx"], updates=6), trainer(updates=6)
    before = ppo.text_perplexity(TEXT)
    losses = [ppo.update(number).metrics["ptx/loss"] for number in range(6)]
    for number in range(6):
        without.update(number)
    assert losses[-1] < losses[0]
    assert ppo.text_perplexity(TEXT) < before
    assert ppo.text_perplexity(TEXT) < without.text_perplexity(TEXT)
    rows = [ppo.optimiser._text_rows(0, step=step).tolist() for step in range(3)]
    assert sorted(rows[0] + rows[1][:3]) == list(range(9))
    assert sorted(rows[1][3:] + rows[2]) == list(range(9))


def test_text_perplexity_is_that_of_a_plain_loop():
    ppo = trainer(double=True, microbatch_size=2)
    total = 0.0
    for row in TEXT:
        logprobs = ppo.roles.policy(row[None]).logits[0].detach().log_softmax(-1)
        total -= sum(float(logprobs[t, row[t + 1]]) for t in range(len(row) - 1))
    assert ppo.text_perplexity(TEXT) == pytest.approx(
        float(torch.tensor(total / (9 * 9)).exp()), rel=1e-5
    )


def test_a_moved_reference_by_hand():
    policy, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    ours = [p.detach().clone() for p in reference.parameters()]
    roles = Roles(policy, reference, None, None)
    move_reference(roles, rate=0.25)
    for now, before, target in zip(reference.parameters(), ours, policy.parameters(), strict=True):
        assert_close(now.detach(), 0.75 * before + 0.25 * target.detach())
    move_reference(roles, rate=1.0)
    pairs = zip(reference.parameters(), policy.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_raw_scores_are_what_the_head_says():
    model, raw = tiny_reward_model(), tiny_reward_model()
    take_raw_scores(raw)
    responses = [[3, 1]] * 4
    normal = score_responses(model, PROMPTS[:4], responses, pad_id=PAD)
    plain = score_responses(raw, PROMPTS[:4], responses, pad_id=PAD)
    assert_close(plain, normal * 2.0 + 0.25)  # the constants of tests.support
