"""KL, entropy and text losses, dual and asymmetric clipping: by hand, against loops, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.ppo.kl import full_kl
from pipeline.ppo.losses import entropy_loss, kl_loss, policy_loss, text_loss
from pipeline.ppo.settings import KL, Optimisation, Reward
from tests.ppo.ragged import Ragged
from tests.ppo.test_losses import ONE, scalar
from tests.support import assert_close


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.25, -2.5, -2.5),  # below 1 + 0.3: free, where a clip of 0.2 would stop it
        (2.0, 1.5, -2.6, 0.0),  # clipped at 1.3
        (-2.0, 0.7, 1.6, 0.0),  # clipped at 1 - 0.2
        (-2.0, 2.0, 4.0, 4.0),  # below the dual clip of 3
        (-2.0, 5.0, 6.0, 0.0),  # 3 * 2: the dual clip
        (2.0, 5.0, -2.6, 0.0),  # which a good action never meets
    ],
)
def test_asymmetric_and_dual_clip_by_hand(advantage, ratio, loss, gradient):
    logprob = scalar(math.log(ratio), grad=True)
    result = policy_loss(
        logprob, scalar(0.0), scalar(advantage), ONE,
        clip=0.2, clip_high=0.3, dual_clip=3.0, num_tokens=1,
    )  # fmt: skip
    result.value.backward()
    assert_close(result.value, loss)
    assert_close(logprob.grad, [[gradient]])
    assert result.sums["clip_frac"] == float(gradient == 0.0)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_losses_and_their_gradients_agree_with_loops(seed):
    batch = Ragged(seed)
    first, old, reference = batch.draw(), batch.draw(), batch.draw()
    mask, num_tokens = batch.mask, batch.num_tokens
    for estimator in ("k2", "k3"):
        new = torch.where(mask, first, 0.0).requires_grad_()
        loss = kl_loss(new, old, reference, mask, estimator=estimator, num_tokens=num_tokens)
        loss.value.backward()
        total, gradient = 0.0, torch.zeros_like(first)
        for row, t in mask.nonzero().tolist():
            log_ratio = float(first[row, t] - reference[row, t])
            weight = math.exp(float(first[row, t] - old[row, t])) / num_tokens
            if estimator == "k2":
                total += weight * log_ratio**2 / 2
                gradient[row, t] = weight * log_ratio
            else:
                total += weight * (math.exp(-log_ratio) - 1 + log_ratio)
                gradient[row, t] = weight * (1 - math.exp(-log_ratio))
        assert_close(loss.value, total)
        assert_close(new.grad, gradient)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_expected_gradient_descends_the_divergence_that_is_claimed(estimator):
    generator = torch.Generator().manual_seed(3)
    logits, old, reference = (torch.randn(1, 6, generator=generator).double() for _ in range(3))
    divergence = logits.clone().requires_grad_()
    pair = (divergence, reference) if estimator == "k2" else (reference, divergence)
    full_kl(*pair).sum().backward()
    sampled = logits.clone().requires_grad_()
    logprobs, old = sampled.log_softmax(-1), old.log_softmax(-1)
    for token in range(6):  # the expectation over samples of the old policy
        here = slice(token, token + 1)
        loss = kl_loss(
            logprobs[:, here], old[:, here], reference.log_softmax(-1)[:, here], ONE,
            estimator=estimator, num_tokens=1,
        )  # fmt: skip
        (float(old[0, token].exp()) * loss.value).backward(retain_graph=True)
    assert_close(sampled.grad, divergence.grad)


def test_entropy_loss_by_hand():
    entropy = torch.tensor([[1.0, 2.0], [4.0, float("nan")]]).double().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    loss = entropy_loss(entropy, mask, num_tokens=4)
    loss.value.backward()
    assert_close(loss.value, -7 / 4)
    assert_close(entropy.grad, [[-0.25, -0.25], [-0.25, 0.0]])


def test_text_loss_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, -1.0]]).double().requires_grad_()
    loss = text_loss(logprobs, num_tokens=8)
    loss.value.backward()
    assert_close(loss.value, 1.0)
    assert_close(logprobs.grad, [[-0.125] * 2] * 2)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (KL, {"penalty": "k1_in_loss"}, "kl.penalty: must be one of k1_in_reward, .*k1_in_loss"),
        (KL, {"reference_rate": 1.5}, "kl.reference_rate: must be between 0 and 1, got 1.5"),
        (KL, {"reference_every": 0}, "kl.reference_every: must be at least 1, got 0"),
        (Reward, {"normalise": False, "clip": 2.0}, "reward.clip: only normalised scores"),
        (Optimisation, {"clip_high": 0.0}, "optimisation.clip_high: must be positive or null"),
        (Optimisation, {"target_kl": -1.0}, "optimisation.target_kl: must be positive or null"),
        (Optimisation, {"dual_clip": 1.0}, "optimisation.dual_clip: must be above 1 or null"),
        (Optimisation, {"entropy_coef": -0.1}, "optimisation.entropy_coef: must be at least 0"),
        (Optimisation, {"ptx_coef": -0.1}, "optimisation.ptx_coef: must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(group, options, message):
    with pytest.raises(UserError, match=message):
        group(**options)
