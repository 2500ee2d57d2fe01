"""The Bradley-Terry loss by hand, against a slow loop, and its gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reward.loss import comparison_loss, comparisons, rater_targets
from tests.support import assert_close


def slow_loss(scores: list[float], ratings: list[float], *, min_gap: float) -> float:
    """Sum of -log P(better beats worse) over every ordered pair, one pair at a time."""
    total = 0.0
    for a in range(len(scores)):
        for b in range(len(scores)):
            if ratings[a] > ratings[b] and ratings[a] - ratings[b] >= min_gap:
                total += math.log1p(math.exp(-(scores[a] - scores[b])))
    return total


def test_two_texts_by_hand():
    # Scores 2 and 1: P = sigmoid(1) = 0.731059, -log P = 0.313262; the other way 1.313262.
    scores = torch.tensor([2.0, 1.0])
    pair = {"better": torch.tensor([0]), "worse": torch.tensor([1])}
    assert_close(comparison_loss(scores, **pair, targets=torch.ones(1)), 0.3132617)
    assert_close(comparison_loss(scores, **pair, targets=torch.zeros(1)), 1.3132617)
    assert_close(comparison_loss(scores, **pair, targets=torch.tensor([0.75])), 0.5632617)


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.integers(-8, 8).map(lambda n: n / 4)), min_size=2, max_size=9
    )
)
def test_a_ranking_equals_the_slow_loop(texts):
    scores, ratings = [score for score, _ in texts], [rating for _, rating in texts]
    better, worse = comparisons(torch.tensor(ratings), min_gap=0.5)
    loss = comparison_loss(
        torch.tensor(scores), better=better, worse=worse, targets=torch.ones(len(better))
    )
    assert_close(loss, slow_loss(scores, ratings, min_gap=0.5), tolerance=1e-4)


def test_the_gradient_is_the_probability_of_being_wrong():
    # d/ds_better of -log sigmoid(m) = -(1 - sigmoid(m)); m = 0.5: 1 - 0.622459 = 0.377541.
    scores = torch.tensor([0.5, 0.0], requires_grad=True)
    pair = {"better": torch.tensor([0]), "worse": torch.tensor([1])}
    comparison_loss(scores, **pair, targets=torch.ones(1)).backward()
    assert_close(scores.grad, [-0.3775407, 0.3775407])


def test_a_soft_target_is_met_where_the_model_predicts_it():
    # sigmoid(log 3) = 0.75: no gradient at target 0.75.
    scores = torch.tensor([math.log(3.0), 0.0], requires_grad=True)
    pair = {"better": torch.tensor([0]), "worse": torch.tensor([1])}
    comparison_loss(scores, **pair, targets=torch.tensor([0.75])).backward()
    assert_close(scores.grad, [0.0, 0.0])


def test_only_differences_of_scores_matter():
    ratings = torch.tensor([1.0, 2.0, 0.0])
    better, worse = comparisons(ratings, min_gap=0.0)
    scores, targets = torch.tensor([0.3, -1.0, 2.0]), torch.ones(3)
    losses = [
        comparison_loss(scores + shift, better=better, worse=worse, targets=targets)
        for shift in (0.0, 7.0)
    ]
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize(("gap", "expected"), [(0.0, 3), (1.0, 2), (2.0, 1), (2.5, 0)])
def test_comparisons_need_the_gap(gap, expected):
    # Ratings 0, 0.5, 2, one tie with 2: gaps 0.5, 2, 1.5.
    assert len(comparisons(torch.tensor([0.0, 0.5, 2.0]), min_gap=gap)[0]) == expected


def test_equal_ratings_are_no_comparison():
    assert len(comparisons(torch.tensor([1.0, 1.0]), min_gap=0.0)[0]) == 0


def test_rater_targets_by_hand():
    # One rater of {2, 2, 0} against one of {0, 1}: of 6 encounters 4 wins, 1 tie, 1 loss: 4.5 / 6.
    targets = rater_targets([[0, 1], [2, 2, 0]], better=torch.tensor([1]), worse=torch.tensor([0]))
    assert_close(targets, [0.75])


def test_rater_targets_equal_the_slow_count():
    ratings = [[-4, 0, 3, 3], [1, 1], [4, -2, 0]]
    pairs = [(0, 1), (2, 0), (1, 2)]
    expected = [
        sum((x > y) + (x == y) / 2 for x in ratings[a] for y in ratings[b])
        / (len(ratings[a]) * len(ratings[b]))
        for a, b in pairs
    ]
    better, worse = (torch.tensor(side) for side in zip(*pairs, strict=True))
    assert_close(rater_targets(ratings, better=better, worse=worse), expected)
