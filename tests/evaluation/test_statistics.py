"""Intervals, win rates and the length-controlled win rate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.statistics import length_controlled, mean, outcomes, ratio, resample

ONES = np.ones((1, 4))


def floats(*values):
    return np.array(values, dtype=np.float64)


def test_outcomes_are_one_a_half_and_zero():
    found = outcomes(floats(0.5, 0.2, -0.1), floats(0.1, 0.2, 0.3))
    assert found.tolist() == [1.0, 0.5, 0.0]


def test_a_mean_with_unit_weights_has_no_spread():
    # (1 + 0.5 + 0 + 1) / 4 = 0.625, and every sample is the whole.
    found = mean(floats(1, 0.5, 0, 1), ONES)
    assert (found.value, found.low, found.high) == (0.625, 0.625, 0.625)


def test_a_perplexity_pools_tokens_before_it_exponentiates():
    # exp((2 + 6) / (1 + 3)) = e^2, not the mean of e^2 and e^2 by chance: (1 + 9) / 4 differs.
    assert ratio(floats(2, 6), floats(1, 3), np.ones((1, 2)), transform=np.exp).value == (
        pytest.approx(np.e**2)
    )
    uneven = ratio(floats(1, 9), floats(1, 3), np.ones((1, 2)), transform=np.exp)
    assert uneven.value == pytest.approx(np.exp(2.5))


def test_rows_of_one_group_are_drawn_together():
    weights = resample(["a", "a", "b", "c", "b"], samples=200, seed=0)
    assert weights.shape == (200, 5)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2] == weights[:, 4]).all()
    # Three groups are drawn each time, whatever their sizes.
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()
    assert set(weights[:, 3]) >= {0.0, 1.0, 2.0}


def test_a_bootstrap_over_groups_is_wider_than_over_rows():
    values = np.repeat(floats(0, 1, 0, 1, 1, 0, 0, 1), 10)
    grouped = mean(values, resample([str(i // 10) for i in range(80)], samples=500, seed=1))
    single = mean(values, resample([str(i) for i in range(80)], samples=500, seed=1))
    assert grouped.high - grouped.low > 2 * (single.high - single.low)


def test_the_interval_covers_about_95_of_100_true_means():
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        values = generator.normal(size=60)
        found = mean(values, resample([str(i) for i in range(60)], samples=300, seed=trial))
        inside += found.low <= 0 <= found.high
    assert 0.90 <= inside / 200 <= 0.99


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30), st.integers(0, 99))
def test_a_win_rate_and_its_interval_lie_between_0_and_1(wins, seed):
    weights = resample([str(i) for i in range(len(wins))], samples=50, seed=seed)
    found = mean(np.array(wins), weights)
    assert 0 <= found.low <= found.high <= 1
    assert found.value == pytest.approx(sum(wins) / len(wins))


def test_length_control_agrees_with_sklearn():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(3)
    longer = generator.normal(1.0, 2.0, size=400)
    wins = (generator.random(400) < 1 / (1 + np.exp(-(0.3 + 0.8 * longer)))).astype(float)
    found = length_controlled(wins, longer, np.ones((1, 400)))
    theirs = LogisticRegression(C=1e6, tol=1e-10).fit(longer[:, None], wins)
    assert found.value == pytest.approx(theirs.predict_proba([[0.0]])[0, 1], abs=1e-3)
    # Longer replies win here, so at equal length PPO wins less than it seems to.
    assert found.value < wins.mean() - 0.05


def test_length_control_without_a_length_difference_is_the_win_rate():
    found = length_controlled(floats(1, 1, 0, 0.5), np.zeros(4), ONES)
    assert found.value == pytest.approx(0.625, abs=1e-3)


@pytest.mark.parametrize(("wins", "rate"), [((1, 1, 1, 1), 1.0), ((0, 0, 0, 0), 0.0)])
def test_length_control_of_an_even_sweep_is_finite(wins, rate):
    found = length_controlled(floats(*wins), floats(1, 2, 3, -4), ONES)
    assert found.value == pytest.approx(rate, abs=0.02)


def test_length_control_survives_perfect_separation():
    found = length_controlled(floats(1, 1, 0, 0), floats(5, 4, -4, -5), ONES)
    assert found.value == pytest.approx(0.5, abs=1e-6)


def test_mirrored_policies_have_mirrored_length_controlled_rates():
    generator = np.random.default_rng(5)
    wins, longer = generator.choice([0.0, 0.5, 1.0], 50), generator.normal(size=50)
    ours = length_controlled(wins, longer, np.ones((1, 50)))
    theirs = length_controlled(1 - wins, -longer, np.ones((1, 50)))
    assert ours.value + theirs.value == pytest.approx(1.0, abs=1e-9)
