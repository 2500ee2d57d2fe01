"""The clipped losses and their gradients by hand; test_reference.py holds them to the papers."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ppo.losses import policy_loss, value_loss
from tests.ppo.ragged import Ragged, batches
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


@given(batch=batches, cut=st.integers(1, 4))
def test_cutting_a_minibatch_changes_neither_loss_nor_gradient(batch, cut):
    old, advantages, mask = batch.draw(), batch.draw(), batch.mask
    whole = (old + batch.draw(scale=0.2)).requires_grad_()
    parts, tokens = whole.detach().clone().requires_grad_(), batch.num_tokens
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
    batch = Ragged(5)
    logprobs, old, none = batch.draw().requires_grad_(), batch.draw(), batch.draw(scale=0.0)
    policy_loss(
        logprobs, old, none, batch.mask, clip=0.2, num_tokens=batch.num_tokens
    ).value.backward()
    assert bool((logprobs.grad == 0).all())


def test_equal_policies_have_ratio_one_and_no_kl():
    batch = Ragged(6)
    old, tokens = batch.draw(), batch.num_tokens
    sums = policy_loss(old, old, batch.draw(), batch.mask, clip=0.2, num_tokens=tokens).sums
    assert sums == {"approx_kl": 0.0, "clip_frac": 0.0, "ratio": tokens, "ratio_squared": tokens}
