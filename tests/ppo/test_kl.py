"""KL estimators, the exact divergence, and the controllers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ppo.kl import AdaptiveController, FixedController, compensated, full_kl, k1, k2, k3
from tests.support import assert_close


def logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(3, 6, generator=generator).double() for _ in range(2))
    return first, second


@given(seed=st.integers(0, 10_000))
def test_estimators_are_unbiased_for_the_exact_kl(seed):
    policy, reference = logits(seed)
    exact = full_kl(policy, reference)
    logprobs, ref_logprobs = policy.log_softmax(-1), reference.log_softmax(-1)
    for estimator in (k1, k3):
        expected = (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(-1)
        assert_close(expected, exact)
    assert bool((k3(logprobs, ref_logprobs) >= 0).all())


def test_compensation_gives_back_a_share_of_the_mean_kl_per_token():
    kl = torch.tensor([[0.3, 0.5, 9.0], [0.4, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # mean over the three valid tokens: 0.4
    assert_close(compensated(kl, mask, share=0.0), [[0.3, 0.5, 0.0], [0.4, 0.0, 0.0]])
    assert_close(compensated(kl, mask, share=1.0), [[-0.1, 0.1, 0.0], [0.0, 0.0, 0.0]])
    assert_close(compensated(kl, mask, share=0.5), [[0.1, 0.3, 0.0], [0.2, 0.0, 0.0]])


def test_k2_by_hand():
    assert_close(k2(torch.tensor([0.0]).double(), torch.tensor([-3.0]).double()), [4.5])


def test_full_kl_by_hand():
    # policy (1/2, 1/2) against (1/4, 3/4): 0.5 ln 2 + 0.5 ln(2/3) = 0.14384
    policy = torch.tensor([[0.5, 0.5]]).double().log()
    reference = torch.tensor([[0.25, 0.75]]).double().log()
    assert_close(full_kl(policy, reference), [0.14384103622589045])


def test_kl_of_equal_policies_is_zero():
    policy, _ = logits(1)
    assert_close(full_kl(policy, policy), [0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 128 / 1000)),  # error 0.1
        (60.0, 0.1 * (1 + 0.2 * 128 / 1000)),  # clipped at 0.2
        (0.0, 0.1 * (1 - 0.2 * 128 / 1000)),
    ],
)
def test_adaptive_controller_by_hand(kl, expected):
    controller = AdaptiveController(0.1, target=6.0, horizon=1000.0)
    controller.update(kl, num_episodes=128)
    assert controller.coef == pytest.approx(expected)
    assert controller.state() == {"coef": controller.coef}


def test_adaptive_controller_steers_a_simple_world_to_its_target():
    controller = AdaptiveController(1.0, target=4.0, horizon=500.0)
    for _ in range(500):
        controller.update(1.0 / controller.coef, num_episodes=50)  # KL falls as beta rises
    assert 1.0 / controller.coef == pytest.approx(4.0, rel=1e-3)


def test_fixed_controller_never_moves():
    controller = FixedController(0.3)
    controller.update(100.0, num_episodes=128)
    assert controller.state() == {"coef": 0.3}
