"""The update as a whole: what it starts from, what it must not depend on, what stops it."""

import dataclasses

import pytest
import torch

from pipeline.errors import UserError
from pipeline.ppo.rollout import Sampled
from pipeline.ppo.settings import KL, Optimisation, Reward
from tests.ppo.worlds import PROMPTS, trainer, weights

LOGGED = {
    "objective/kl", "objective/kl_k3", "objective/score", "objective/reward", "objective/entropy",
    "policy/approx_kl", "policy/clip_frac", "policy/ratio_mean", "policy/ratio_var",
    "policy/first_approx_kl", "policy/grad_norm", "policy/loss", "value/loss", "value/clip_frac",
    "value/explained_variance", "value/grad_norm", "response/length_tokens", "response/eos_frac",
    "reward/clip_frac", "kl/coef", "optim/lr",
}  # fmt: skip


def test_the_first_update_starts_at_the_reference():
    ppo = trainer()
    outcome = ppo.update(0)
    assert set(outcome.metrics) == LOGGED
    assert outcome.metrics["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert outcome.metrics["optim/lr"] == pytest.approx(3e-3)
    assert {"time/rollout_seconds", "throughput/optimise_tokens_per_second"} <= set(outcome.timings)


def test_the_learning_rate_decays_linearly():
    ppo = trainer(updates=4)
    rates = [ppo.update(number).metrics["optim/lr"] for number in range(4)]
    assert rates == pytest.approx([3e-3, 3e-3 * 0.75, 3e-3 * 0.5, 3e-3 * 0.25])


def test_no_model_leaves_evaluation_mode_so_that_dropout_is_off():
    ppo = trainer()
    ppo.update(0)
    assert not [name for name, model in vars(ppo.roles).items() if model.training]


def test_reference_and_reward_model_never_move():
    ppo = trainer()
    frozen = [ppo.roles.reference, ppo.roles.reward_model]
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in frozen]
    ppo.update(0)
    for model, state in zip(frozen, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_cut_into_microbatches_changes_no_metric():
    whole, cut = trainer(double=True), trainer(double=True, microbatch_size=2)
    first, second = whole.update(0).metrics, cut.update(0).metrics
    for name in LOGGED:
        assert second[name] == pytest.approx(first[name], abs=1e-9), name


def test_every_prompt_is_used_once_per_epoch():
    ppo = trainer(prompts_per_update=6)
    rows = [row for number in range(10) for row in ppo.prompt_rows(number)]
    size = len(PROMPTS)
    epochs = [rows[start : start + size] for start in range(0, len(rows), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    straight = trainer(kl=KL(coef=0.1, controller="adaptive", target=0.01, horizon=100.0))
    for number in range(3):
        straight.update(number)
        if number == 0:
            straight.save(tmp_path)
    resumed = trainer(kl=straight.settings.kl)
    resumed.load(tmp_path, step=straight.settings.steps_per_update)
    for number in (1, 2):
        resumed.update(number)
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.kl.coef == straight.kl.coef != 0.1


def test_a_point_of_the_former_format_is_numbered_by_updates(tmp_path):
    before, now = trainer(), trainer()
    before.update(0)
    before.save(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(
        {key: state[key] for key in state.keys() - {"updates", "midway"}}, tmp_path / "state.pt"
    )
    now.load(tmp_path, step=1)
    assert (now.updates, now.steps) == (1, now.settings.steps_per_update)


def test_options_of_the_reward_enter_the_update():
    plain = trainer().update(0).metrics
    clipped = trainer(reward=Reward(clip=0.01, missing_eos_score=None)).update(0).metrics
    whitened = trainer(reward=Reward(whiten=True)).update(0).metrics
    assert clipped["reward/clip_frac"] > 0.9
    assert abs(clipped["objective/reward"]) <= 0.01 + 1e-6
    assert whitened["value/loss"] != plain["value/loss"]


def test_in_bf16_the_update_runs_and_the_first_ratio_is_near_one():
    metrics = trainer(precision="bf16", optimisation=Optimisation(epochs=1)).update(0).metrics
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=0.1)


def test_a_policy_that_is_not_the_reference_is_refused():
    ppo = trainer()
    with torch.no_grad():
        ppo.roles.policy.lm_head.weight.mul_(0.5)
    with pytest.raises(UserError, match="policy and reference differ by .* nats a token"):
        ppo.update(0)


def test_a_score_that_is_not_finite_stops_the_stage_naming_rows():
    ppo = trainer()
    ppo.roles.reward_model.score.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="reward model's score is not finite in rows \\[0, 1"):
        ppo.update(0)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves():
    ppo = trainer()
    before = weights(ppo)
    measure = ppo.measure

    def poisoned(*args):
        experience = measure(*args)
        return dataclasses.replace(experience, values=experience.values * float("inf"))

    ppo.measure = poisoned
    with pytest.raises(UserError, match="policy/loss is nan \\(rows .*lower the learning rate"):
        ppo.update(0)
    assert torch.equal(weights(ppo), before)


def test_a_wrong_first_ratio_stops_the_stage():
    ppo = trainer()
    measure = ppo.measure

    def stale(*args):
        experience = measure(*args)
        return dataclasses.replace(
            experience,
            logprobs=experience.logprobs - 0.5,
            ref_logprobs=experience.ref_logprobs - 0.5,
        )

    ppo.measure = stale
    with pytest.raises(
        UserError, match="first minibatch is 0.15 nats a token from its own rollout"
    ):
        ppo.update(0)


def test_an_exploding_ratio_stops_the_stage():
    rates = Optimisation(max_ratio=0.5)  # the first ratio is 1
    with pytest.raises(UserError, match=r"policy/ratio_mean is .*lower optimisation.learning_rate"):
        trainer(optimisation=rates).update(0)


def test_an_infinite_gradient_stops_the_stage():
    ppo = trainer()
    next(ppo.roles.value.parameters()).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match="value/grad_norm is (nan|inf)"):
        ppo.update(0)


def test_an_empty_response_stops_the_stage():
    ppo = trainer()
    experience = ppo.measure(PROMPTS[:2], Sampled([[3, 1], [4, 1]]))
    ppo.measure = lambda *_: dataclasses.replace(experience, responses=[[3, 1], []])
    with pytest.raises(UserError, match=r"empty responses in rows \[1\]"):
        ppo.update(0)
