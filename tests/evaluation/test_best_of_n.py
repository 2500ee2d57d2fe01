"""Best-of-n from all subsets of the draws, and PPO against it at equal KL."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.best_of_n import Point, at_equal_kl, best_weights, kl_bound


def test_the_bound_on_the_divergence():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(16) == pytest.approx(2.7725887 - 0.9375)


def test_best_of_all_draws_is_the_best_and_best_of_one_is_any():
    scores = np.array([[0.3, -1.0, 2.0, 0.5]])
    assert best_weights(scores, n=4).tolist() == [[0, 0, 1, 0]]
    assert best_weights(scores, n=1).tolist() == [[0.25, 0.25, 0.25, 0.25]]


def test_best_of_two_of_three_by_hand():
    # Pairs of (low, middle, high): high wins two of three, middle one, low none.
    assert best_weights(np.array([[2.0, 3.0, 1.0]]), n=2)[0] == pytest.approx([1 / 3, 2 / 3, 0])


@settings(max_examples=30)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_weights_are_shares_of_every_subset(order, n):
    scores = np.array([order], dtype=np.float64)
    slow = np.zeros(6)
    subsets = list(itertools.combinations(range(6), n))
    for subset in subsets:
        slow[max(subset, key=lambda draw: scores[0, draw])] += 1 / len(subsets)
    assert best_weights(scores, n=n)[0] == pytest.approx(slow)


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_the_draws_is_refused(n):
    with pytest.raises(ValueError, match="from 1 to the 3 draws there are"):
        best_weights(np.zeros((2, 3)), n=n)


def points():
    return [
        Point(n=2, kl=0.2, wins=np.array([0.6, 0.6])),
        Point(n=4, kl=0.6, wins=np.array([0.8, 0.6])),
    ]


def test_between_two_sizes_the_control_is_interpolated():
    # Half way from KL 0.2 to 0.6: (0.7, 0.6), so PPO's (1, 0.5) leads by (0.3 - 0.1) / 2.
    found = at_equal_kl(points(), kl=0.4, wins=np.array([1.0, 0.5]), weights=np.ones((1, 2)))
    assert found.best_of_n.value == pytest.approx(0.65)
    assert found.difference.value == pytest.approx(0.1)
    assert found.within_range


def test_no_divergence_is_sft_against_itself():
    found = at_equal_kl(points(), kl=0.0, wins=np.array([0.5, 0.5]), weights=np.ones((1, 2)))
    assert found.best_of_n.value == 0.5
    assert found.difference.value == 0.0


def test_beyond_the_largest_n_the_control_is_that_n_and_says_so():
    found = at_equal_kl(points(), kl=5.0, wins=np.array([1.0, 1.0]), weights=np.ones((1, 2)))
    assert found.best_of_n.value == pytest.approx(0.7)
    assert not found.within_range
