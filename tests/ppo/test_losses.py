"""The clipped losses: by hand, against loops, and their gradients."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ppo.losses import policy_loss, value_loss
from tests.ppo.test_advantages import ragged
from tests.support import assert_close

ONE = torch.tensor([[True]])


def scalar(value: float, *, grad: bool = False) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64, requires_grad=grad)


def test_policy_loss_by_hand():
    # ratio 1.5, advantage 2, clip 0.2: -min(1.5 * 2, 1.2 * 2) = -2.4; clipped, so no gradient
    logprob = scalar(math.log(1.5), grad=True)
    loss = policy_loss(logprob, scalar(0.0), scalar(2.0), ONE, clip=0.2, num_tokens=1)
    assert_close(loss.value, -2.4)
    loss.value.backward()
    assert_close(logprob.grad, [[0.0]])
    assert loss.sums["clip_frac"] == 1.0


def test_a_bad_action_made_likelier_is_not_clipped():
    # ratio 1.5, advantage -2: -min(-3, -2.4) = 3; gradient of -A ratio is 3 too
    logprob = scalar(math.log(1.5), grad=True)
    loss = policy_loss(logprob, scalar(0.0), scalar(-2.0), ONE, clip=0.2, num_tokens=1)
    loss.value.backward()
    assert_close(loss.value, 3.0)
    assert_close(logprob.grad, [[3.0]])
    assert loss.sums["clip_frac"] == 0.0


def test_value_loss_by_hand():
    # old 0, new 1, clip 0.2 -> 0.2; target 2: 0.5 max((1 - 2)^2, (0.2 - 2)^2) = 0.5 * 3.24
    loss = value_loss(scalar(1.0), scalar(0.0), scalar(2.0), ONE, clip=0.2, num_tokens=1)
    assert_close(loss.value, 1.62)
    # target 0: 0.5 max(1, 0.04) = 0.5
    loss = value_loss(scalar(1.0), scalar(0.0), scalar(0.0), ONE, clip=0.2, num_tokens=1)
    assert_close(loss.value, 0.5)


def slow_policy_loss(logprobs, old, advantages, mask, clip):
    total, tokens = 0.0, 0
    for row in range(len(logprobs)):
        for t in range(int(mask[row].sum())):
            ratio = math.exp(float(logprobs[row, t] - old[row, t]))
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            total -= min(ratio * float(advantages[row, t]), bounded * float(advantages[row, t]))
            tokens += 1
    return total / tokens


def slow_value_loss(values, old, returns, mask, clip):
    total, tokens = 0.0, 0
    for row in range(len(values)):
        for t in range(int(mask[row].sum())):
            value, before = float(values[row, t]), float(old[row, t])
            near = before + min(max(value - before, -clip), clip)
            target = float(returns[row, t])
            total += 0.5 * max((value - target) ** 2, (near - target) ** 2)
            tokens += 1
    return total / tokens


@given(seed=st.integers(0, 10_000), clip=st.floats(0.05, 0.5))
def test_losses_agree_with_loops(seed, clip):
    (first, second), mask = ragged(seed)
    third = ragged(seed + 1)[0][0]
    first, second = 0.1 * first, 0.1 * second
    tokens = int(mask.sum())
    fast = policy_loss(first, second, third, mask, clip=clip, num_tokens=tokens).value
    assert_close(fast, slow_policy_loss(first, second, third, mask, clip))
    fast = value_loss(first, second, third, mask, clip=clip, num_tokens=tokens).value
    assert_close(fast, slow_value_loss(first, second, third, mask, clip))


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 4))
def test_cutting_a_minibatch_changes_neither_loss_nor_gradient(seed, cut):
    (old, advantages), mask = ragged(seed)
    whole = torch.where(mask, 0.01 * old, 0.0).requires_grad_()
    parts = whole.detach().clone().requires_grad_()
    tokens, old = int(mask.sum()), torch.zeros_like(old)
    together = policy_loss(whole, old, advantages, mask, clip=0.2, num_tokens=tokens).value
    together.backward()
    pieces = [
        policy_loss(
            parts[rows], old[rows], advantages[rows], mask[rows], clip=0.2, num_tokens=tokens
        ).value
        for rows in (slice(0, cut), slice(cut, None))
    ]
    sum(pieces).backward()
    assert_close(sum(pieces).detach(), together.detach())
    assert_close(parts.grad, whole.grad)


def test_zero_advantage_gives_zero_gradient():
    (old, _), mask = ragged(5)
    logprobs = torch.where(mask, old, 0.0).requires_grad_()
    loss = policy_loss(
        logprobs, old, torch.zeros_like(old), mask, clip=0.2, num_tokens=int(mask.sum())
    )
    loss.value.backward()
    assert bool((logprobs.grad == 0).all())


def test_equal_policies_have_ratio_one_and_no_kl():
    (old, advantages), mask = ragged(6)
    tokens = int(mask.sum())
    sums = policy_loss(old, old, advantages, mask, clip=0.2, num_tokens=tokens).sums
    assert sums == {"approx_kl": 0.0, "clip_frac": 0.0, "ratio": tokens, "ratio_squared": tokens}


def test_junk_outside_the_mask_reaches_no_gradient():
    mask = torch.tensor([[True, False]])
    logprobs = torch.tensor([[0.0, float("nan")]]).double().requires_grad_()
    junk = torch.tensor([[0.0, float("nan")]]).double()
    loss = policy_loss(logprobs, junk, junk + 1.0, mask, clip=0.2, num_tokens=1)
    loss.value.backward()
    assert_close(logprobs.grad, [[-1.0, 0.0]])
