"""GAE and whitening by hand and by property; test_reference.py holds them to the papers."""

import torch
from hypothesis import given

from pipeline.ppo.advantages import gae, sequence_sum, token_mean, whiten
from tests.ppo.ragged import batches
from tests.support import assert_close


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 9.0]]).double()
    values = torch.tensor([[0.5, 0.25, 9.0]]).double()
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0 + 0.25 - 0.5 = -0.25; A_0 = -0.25 + 0.5 * 0.75 = 0.125
    assert_close(advantages, [[0.125, 0.75, 0.0]])
    assert_close(returns, [[0.625, 1.0, 0.0]])


def test_whitening_by_hand():
    # 0 and 4: mean 2, deviation 2. Shifted: -1, 1; the mean put back: 1, 3, which is x / 2 + 1
    values, mask = torch.tensor([[0.0, 4.0, 9.0]]).double(), torch.tensor([[True, True, False]])
    assert_close(whiten(values, mask), [[-1.0, 1.0, 0.0]], tolerance=1e-8)
    assert_close(whiten(values, mask, shift_mean=False), [[1.0, 3.0, 0.0]], tolerance=1e-8)


@given(batch=batches.filter(lambda batch: batch.num_tokens > 1))
def test_whitened_values_have_mean_zero_and_variance_one(batch):
    values = batch.draw(scale=5.0)
    whitened = whiten(values, batch.mask)
    assert_close(whitened[batch.mask].mean(), 0.0, tolerance=1e-8)
    if float(values[batch.mask].var()) > 1e-3:
        assert_close(whitened[batch.mask].var(unbiased=False), 1.0, tolerance=1e-4)
    assert bool((whitened[~batch.mask] == 0).all())
    kept = whiten(values, batch.mask, shift_mean=False)
    assert_close(kept[batch.mask].mean(), values[batch.mask].mean(), tolerance=1e-8)


def test_equal_values_whiten_to_zero():
    values = torch.full((2, 3), 4.0).double()
    assert_close(whiten(values, torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3))


def test_reductions_by_hand():
    values = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]]).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(token_mean(values, mask), 3.0)  # (1 + 2 + 6) / 3
    assert_close(sequence_sum(values, mask), [3.0, 6.0])
