"""Every formula equals the slow reference in float64, to 1e-10, gradients included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ppo import kl as kl_formulas
from pipeline.ppo.advantages import gae, whiten
from pipeline.ppo.experience import Experience
from pipeline.ppo.losses import policy_loss, value_loss
from pipeline.ppo.metrics import explained_variance, named_sums, objective, step_metrics
from pipeline.ppo.rewards import final_scores, token_rewards
from tests.ppo import reference
from tests.ppo.ragged import Ragged, batches
from tests.support import assert_close

fractions = st.floats(0.0, 1.0)
clips = st.floats(0.05, 0.5)


@given(batch=batches, coef=st.floats(0.0, 2.0))
def test_token_rewards(batch, coef):
    logprobs, ref_logprobs, scores = batch.draw(), batch.draw(), batch.per_row()
    kl = kl_formulas.k1(logprobs, ref_logprobs)
    slow = reference.each(reference.k1, batch.rows(logprobs), batch.rows(ref_logprobs))
    expected = reference.token_rewards(scores.tolist(), slow, coef=coef)
    assert_close(token_rewards(scores, kl, batch.mask, kl_coef=coef), batch.padded(expected))


@given(batch=batches)
def test_k3(batch):
    logprobs, ref_logprobs = batch.draw(), batch.draw()
    expected = reference.each(reference.k3, batch.rows(logprobs), batch.rows(ref_logprobs))
    fast = torch.where(batch.mask, kl_formulas.k3(logprobs, ref_logprobs), 0.0)
    assert_close(fast, batch.padded(expected))


@given(seed=st.integers(0, 10_000), vocabulary=st.integers(2, 9))
def test_the_exact_divergence(seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    policy, other = torch.randn(2, 4, vocabulary, generator=generator).double()
    expected = [
        reference.full_kl(p, q)
        for p, q in zip(policy.softmax(-1).tolist(), other.softmax(-1).tolist(), strict=True)
    ]
    assert_close(kl_formulas.full_kl(policy, other), expected)


@given(batch=batches, missing=st.none() | st.floats(-3.0, 3.0), clip=st.floats(0.0, 1.0))
def test_final_scores(batch, missing, clip):
    scores, ended = batch.per_row(), batch.per_row() > 0
    expected = [
        reference.final_score(score, ended=end, missing_eos_score=missing, clip=clip)
        for score, end in zip(scores.tolist(), ended.tolist(), strict=True)
    ]
    assert_close(final_scores(scores, ended, missing_eos_score=missing, clip=clip), expected)


@given(batch=batches, shift_mean=st.booleans())
def test_whitening(batch, shift_mean):
    values = batch.draw(scale=3.0)
    expected = reference.whiten(batch.rows(values), shift_mean=shift_mean)
    assert_close(whiten(values, batch.mask, shift_mean=shift_mean), batch.padded(expected))


@given(batch=batches, gamma=fractions, lam=fractions)
def test_advantages_and_returns(batch, gamma, lam):
    rewards, values = batch.draw(), batch.draw()
    advantages, returns = gae(rewards, values, batch.mask, gamma=gamma, lam=lam)
    plain = batch.rows(values)
    slow = reference.advantages(batch.rows(rewards), plain, gamma=gamma, lam=lam)
    assert_close(advantages, batch.padded(slow))
    assert_close(returns, batch.padded(reference.each(lambda a, v: a + v, slow, plain)))


def same_loss(batch, fast, slow, gradient):
    """Compares value, gradient and sums of a loss that was drawn by the batch."""
    assert_close(fast.value.detach(), slow.value)
    assert_close(gradient, batch.padded(slow.gradient))
    assert fast.sums == pytest.approx(slow.sums, abs=1e-10)


@given(batch=batches, clip=clips, others=st.integers(0, 50))
def test_policy_loss(batch, clip, others):
    logprobs, old = batch.draw(scale=0.3).requires_grad_(), batch.draw(scale=0.3)
    advantages, num_tokens = batch.draw(), batch.num_tokens + others
    fast = policy_loss(logprobs, old, advantages, batch.mask, clip=clip, num_tokens=num_tokens)
    fast.value.backward()
    tensors = (logprobs.detach(), old, advantages)
    plain = [batch.rows(values) for values in tensors]
    slow = reference.policy_loss(*plain, clip=clip, num_tokens=num_tokens)
    same_loss(batch, fast, slow, logprobs.grad)


@given(batch=batches, clip=clips, others=st.integers(0, 50))
def test_value_loss(batch, clip, others):
    values, old = batch.draw().requires_grad_(), batch.draw()
    returns, num_tokens = batch.draw(), batch.num_tokens + others
    fast = value_loss(values, old, returns, batch.mask, clip=clip, num_tokens=num_tokens)
    fast.value.backward()
    plain = [batch.rows(tensor) for tensor in (values.detach(), old, returns)]
    slow = reference.value_loss(*plain, clip=clip, num_tokens=num_tokens)
    same_loss(batch, fast, slow, values.grad)


@given(
    coef=st.floats(0.01, 3.0),
    kls=st.lists(st.floats(-5.0, 50.0), min_size=1, max_size=6),
    target=st.floats(0.1, 20.0),
    horizon=st.floats(100.0, 1e5),
)
def test_controllers(coef, kls, target, horizon):
    adaptive = kl_formulas.AdaptiveController(coef, target=target, horizon=horizon)
    fixed = kl_formulas.FixedController(coef)
    expected = coef
    for kl in kls:
        adaptive.update(kl, num_episodes=64)
        fixed.update(kl, num_episodes=64)
        expected = reference.adapted(expected, kl, target=target, horizon=horizon, num_episodes=64)
    assert adaptive.coef == pytest.approx(expected, rel=1e-12)
    assert fixed.coef == coef


def experience(batch: Ragged) -> Experience:
    """A rollout of made-up numbers, 0 where there is no token, as the library keeps it."""
    names = ("logprobs", "ref_logprobs", "values", "entropy")
    tokens = {name: torch.where(batch.mask, batch.draw(), 0.0) for name in names}
    responses = [[7] * length for length in batch.lengths.tolist()]
    return Experience(
        prompts=[[3]] * len(responses), responses=responses, mask=batch.mask,
        scores=batch.per_row(), ended=batch.per_row() > 0, **tokens,
    )  # fmt: skip


@given(batch=batches, coef=st.floats(0.0, 2.0), clip=st.floats(0.0, 1.0))
def test_metrics_of_the_objective(batch, coef, clip):
    rollout, scores = experience(batch), batch.per_row()
    fast = objective(rollout, scores, rollout.kl / 2, kl_coef=coef, clip=clip)
    count = len(batch.lengths)
    pairs = batch.rows(rollout.logprobs), batch.rows(rollout.ref_logprobs)
    kl = sum(reference.flat(reference.each(reference.k1, *pairs))) / count
    raw = rollout.scores.tolist()
    assert fast == pytest.approx(
        {
            "objective/kl": kl,
            "objective/kl_k3": sum(reference.flat(reference.each(reference.k3, *pairs))) / count,
            "objective/score": sum(raw) / count,
            "objective/reward": sum(scores.tolist()) / count - coef * kl / 2,
            "objective/entropy": sum(reference.flat(batch.rows(rollout.entropy)))
            / batch.num_tokens,
            "reward/clip_frac": sum(abs(s) > clip > 0 for s in raw) / count,
            "response/length_tokens": sum(batch.lengths.tolist()) / count,
            "response/eos_frac": sum(rollout.ended.tolist()) / count,
            "kl/coef": coef,
        },
        abs=1e-6,  # lengths and shares are counted in float32
    )


@given(batch=batches, cut=st.integers(1, 5))
def test_metrics_of_a_step_come_from_the_sums_of_its_parts(batch, cut):
    logprobs, old = batch.draw(scale=0.3), batch.draw(scale=0.3)
    third, mask, tokens = batch.draw(), batch.mask, batch.num_tokens
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        if not len(mask[rows]):
            continue
        args = (logprobs[rows], old[rows], third[rows], mask[rows])
        policy = policy_loss(*args, clip=0.2, num_tokens=tokens)
        value = value_loss(*args, clip=0.2, num_tokens=tokens)
        parts.append(named_sums({"policy": policy, "value": value}))
    plain = [batch.rows(tensor) for tensor in (logprobs, old, third)]
    policy = reference.policy_loss(*plain, clip=0.2, num_tokens=tokens)
    value = reference.value_loss(*plain, clip=0.2, num_tokens=tokens)
    ratio = policy.sums["ratio"] / tokens
    assert step_metrics(parts, num_tokens=tokens) == pytest.approx(
        {
            "policy/loss": policy.value,
            "policy/approx_kl": policy.sums["approx_kl"] / tokens,
            "policy/clip_frac": policy.sums["clip_frac"] / tokens,
            "policy/ratio_mean": ratio,
            "policy/ratio_var": policy.sums["ratio_squared"] / tokens - ratio**2,
            "value/loss": value.value,
            "value/clip_frac": value.sums["clip_frac"] / tokens,
        },
        abs=1e-10,
    )


@given(batch=batches.filter(lambda batch: batch.num_tokens > 1))
def test_explained_variance(batch):
    values, returns = batch.draw(), batch.draw()
    fast = explained_variance(values[batch.mask], returns[batch.mask])
    slow = reference.explained_variance(batch.rows(values), batch.rows(returns))
    assert fast == pytest.approx(slow, rel=1e-9, abs=1e-9)
