"""GAE and whitening, by hand, against slow loops, and by property."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ppo.advantages import gae, sequence_sum, token_mean, whiten
from tests.support import assert_close


def ragged(seed: int, *, rows: int = 5, width: int = 7):
    """Random float64 values with junk outside a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    values = [torch.randn(rows, width, generator=generator).double() for _ in range(2)]
    return [torch.where(mask, value, 1e6) for value in values], mask


def slow_gae(rewards, values, mask, *, gamma, lam):
    """Generalised advantage estimation as nested loops: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        deltas = []
        for t in range(length):
            after = float(values[row, t + 1]) if t + 1 < length else 0.0
            deltas.append(float(rewards[row, t]) + gamma * after - float(values[row, t]))
        for t in range(length):
            advantages[row, t] = sum(
                (gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[t:])
            )
    return advantages


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 9.0]]).double()
    values = torch.tensor([[0.5, 0.25, 9.0]]).double()
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0 + 0.25 - 0.5 = -0.25; A_0 = -0.25 + 0.5 * 0.75 = 0.125
    assert_close(advantages, [[0.125, 0.75, 0.0]])
    assert_close(returns, [[0.625, 1.0, 0.0]])


@given(
    seed=st.integers(0, 10_000),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_gae_agrees_with_loops(seed, gamma, lam):
    (rewards, values), mask = ragged(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = slow_gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert_close(advantages, expected)
    assert_close(returns, torch.where(mask, expected + values, 0.0))


@given(seed=st.integers(0, 10_000))
def test_lambda_one_gamma_one_is_reward_to_go_minus_value(seed):
    (rewards, values), mask = ragged(seed)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row in range(len(rewards)):
        for t in range(int(mask[row].sum())):
            to_go = rewards[row, t : int(mask[row].sum())].sum()
            assert_close(returns[row, t], to_go)
            assert_close(advantages[row, t], to_go - values[row, t])


@given(seed=st.integers(0, 10_000), extra=st.integers(1, 5))
def test_more_padding_changes_nothing(seed, extra):
    (rewards, values), mask = ragged(seed)
    pad = torch.full((len(rewards), extra), 123.0).double()
    longer_mask = torch.cat([mask, torch.zeros_like(pad, dtype=torch.bool)], dim=1)
    short = gae(rewards, values, mask, gamma=1.0, lam=0.95)[0]
    longer = gae(
        torch.cat([rewards, pad], 1), torch.cat([values, pad], 1), longer_mask, gamma=1.0, lam=0.95
    )[0]
    assert_close(longer[:, : short.shape[1]], short)
    assert_close(whiten(longer, longer_mask)[:, : short.shape[1]], whiten(short, mask))


@given(seed=st.integers(0, 10_000))
def test_whitened_values_have_mean_zero_and_variance_one(seed):
    (values, _), mask = ragged(seed)
    whitened = whiten(values, mask)
    assert_close(whitened[mask].mean(), 0.0, tolerance=1e-8)
    if int(mask.sum()) > 1:
        assert_close(whitened[mask].var(unbiased=False), 1.0, tolerance=1e-5)
    assert bool((whitened[~mask] == 0).all())


@given(seed=st.integers(0, 10_000))
def test_whitening_without_shift_keeps_the_mean(seed):
    (values, _), mask = ragged(seed)
    assert_close(whiten(values, mask, shift_mean=False)[mask].mean(), values[mask].mean())


def test_equal_values_whiten_to_zero():
    values = torch.full((2, 3), 4.0).double()
    assert_close(whiten(values, torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3))


def test_reductions_by_hand():
    values = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]]).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(token_mean(values, mask), 3.0)  # (1 + 2 + 6) / 3
    assert_close(sequence_sum(values, mask), [3.0, 6.0])


def test_rows_may_be_shuffled():
    (rewards, values), mask = ragged(3)
    order = list(range(len(rewards)))
    random.Random(0).shuffle(order)
    straight = whiten(gae(rewards, values, mask, gamma=1.0, lam=0.95)[0], mask)
    shuffled = gae(rewards[order], values[order], mask[order], gamma=1.0, lam=0.95)[0]
    assert_close(whiten(shuffled, mask[order]), straight[order])
