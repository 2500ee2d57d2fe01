"""The report's figures by hand."""

import numpy as np
import pytest

from pipeline.evaluation.statistics import resample
from pipeline.reward.report import (
    RatedSet,
    accuracy,
    agreements,
    binned,
    calibration,
    comparable_pairs,
    correlation,
    human_ceiling,
    pair_accuracy,
    preferences,
    reward_report,
)

RATINGS = np.array([2.0, 1.8, 0.0])


def rated(**changes) -> RatedSet:
    fields = {
        "scores": np.array([0.1, 1.0, 0.4]),
        "ratings": RATINGS,
        "lengths": np.array([3.0, 5.0, 9.0]),
        "scales": ["s"] * 3,
        "groups": ["s"] * 3,
    }
    return RatedSet(**(fields | changes))


def two_texts(*, ratings: list[float], raters: list[list[int]]) -> RatedSet:
    nothing = np.zeros(2)
    return RatedSet(
        scores=nothing,
        ratings=np.array(ratings),
        lengths=nothing,
        scales=["s"] * 2,
        groups=["s"] * 2,
        raters=raters,
    )


def test_pairs_need_the_gap_and_the_scale():
    better, worse = comparable_pairs(RATINGS, ["s"] * 3, min_gap=0.5)
    assert list(zip(better, worse, strict=True)) == [(0, 2), (1, 2)]
    better, worse = comparable_pairs(RATINGS, ["a", "b", "a"], min_gap=0.0)
    assert list(zip(better, worse, strict=True)) == [(0, 2)]


def test_accuracy_counts_ties_half():
    # (0, 2): 0.1 < 0.4 wrong; (1, 2): 1.0 > 0.4 right.
    assert pair_accuracy(rated(), min_gap=0.5) == 0.5
    assert pair_accuracy(rated(scores=np.zeros(3)), min_gap=0.5) == 0.5
    assert pair_accuracy(rated(), min_gap=5.0) is None


def test_the_interval_is_the_bootstrap_over_texts():
    generator = np.random.default_rng(0)
    ratings = generator.normal(size=40)
    scores = ratings + generator.normal(size=40)
    better, worse = comparable_pairs(ratings, ["s"] * 40, min_gap=0.5)
    hits = agreements(scores, better=better, worse=worse)
    units = [str(i) for i in range(40)]
    weights = resample(units, samples=200, seed=1)
    found = accuracy(hits, better=better, worse=worse, weights=weights, units=units)
    draws = []
    for w in weights:  # the slow way: every pair as often as its two texts occur together
        counts = [w[b] * w[c] for b, c in zip(better, worse, strict=True)]
        draws.append(sum(n * h for n, h in zip(counts, hits, strict=True)) / sum(counts))
    assert found.value == pytest.approx(hits.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))))
    assert found.low < found.value < found.high


def test_human_ceiling_by_hand():
    # Unanimous raters: one rater orders the two texts like the others, always.
    assert human_ceiling(
        two_texts(ratings=[2.0, 0.0], raters=[[2, 2, 2], [0, 0]]),
        min_gap=0.5,
        seed=0,
    ) == pytest.approx(1.0)
    # All rate alike: no pair of means differs.
    same = two_texts(ratings=[1.0, 1.0], raters=[[1, 1], [1, 1]])
    assert human_ceiling(same, min_gap=0.5, seed=0) is None
    assert human_ceiling(rated(), min_gap=0.5, seed=0) is None


def test_human_ceiling_leaves_the_one_rater_out_of_the_mean():
    # Ratings {3, 0} and {1, 1}. The one rater says 3: others say 0 < 1, so 3 > 1 is wrong; the
    # one says 0: others say 3 > 1, so 0 < 1 is wrong too. Never right; with itself in the mean
    # (1.5 against 1) it would be right half the time.
    raters = two_texts(ratings=[1.5, 1.0], raters=[[3, 0], [1, 1]])
    assert human_ceiling(raters, min_gap=0.5, seed=0) == 0.0


def test_bins_are_half_open():
    hits, values = np.array([1.0, 0.0, 1.0]), np.array([0.5, 1.0, 3.0])
    assert binned(hits, values, edges=(0.5, 1.0, 2.0, float("inf"))) == [
        {"from": 0.5, "to": 1.0, "num_pairs": 1, "accuracy": 1.0},
        {"from": 1.0, "to": 2.0, "num_pairs": 1, "accuracy": 0.0},
        {"from": 2.0, "to": None, "num_pairs": 1, "accuracy": 1.0},
    ]
    assert binned(hits, values, edges=(-1.0, 0.0))[0]["accuracy"] is None


def test_calibration_by_hand():
    # Differences log 3 (right) and -log 3 (wrong): told 0.75 twice, seen 0.5, so ECE 0.25.
    log3 = float(np.log(3))
    told = calibration(
        np.array([log3, 0.0]),
        better=np.array([0, 1]),
        worse=np.array([1, 0]),
        targets=np.ones(2),
    )
    assert told["expected_calibration_error"] == pytest.approx(0.25)
    assert told["bins"] == [
        {"predicted": pytest.approx(0.75), "observed": 0.5, "num_pairs": 2},
    ]


def test_targets_are_the_chance_of_one_rater_of_each_text():
    # {3, 1} and {1, 2}: 3 beats both, 1 ties with 1 and loses to 2: (2 + 1/2) / 4. The third text
    # has no raters, so that of its mean the order alone is known.
    known = rated(ratings=np.array([2.0, 1.5, 0.0]), raters=[[3, 1], [1, 2], []])
    pairs = {"better": np.array([0, 0]), "worse": np.array([1, 2])}
    assert preferences(known, **pairs, soft=True) == pytest.approx([0.625, 1.0])
    assert preferences(known, **pairs, soft=False) == pytest.approx([1.0, 1.0])


def test_a_model_that_predicts_what_it_was_trained_on_is_calibrated(monkeypatch):
    monkeypatch.setattr("pipeline.reward.report.CHUNK_PAIRS", 7)  # several chunks
    generator = np.random.default_rng(0)
    raters, scores = [], []
    while len(raters) < 200:  # each pair a scale of its own, so that no third text binds scores
        high, low = (generator.integers(0, 5, size=4).tolist() for _ in range(2))
        won = np.mean([[(a > b) + (a == b) / 2 for b in low] for a in high])
        if 0 < won < 1 and sum(high) > sum(low):
            raters += [high, low]
            scores += [np.log(won / (1 - won)), 0.0]
    told = rated(
        scores=np.array(scores),
        ratings=np.array([np.mean(one) for one in raters]),
        lengths=np.ones(200),
        scales=[f"pair {text // 2}" for text in range(200)],
        groups=["s"] * 200,
        raters=raters,
    )

    def found(**changes) -> dict:
        return reward_report({"x": told}, min_gap=0.0, **changes)["sets"]["x"]["calibration"]

    assert found()["observed_by"] == "raters"
    assert found()["expected_calibration_error"] < 1e-6
    assert found(soft=False)["observed_by"] == "order"
    assert found(soft=False)["expected_calibration_error"] > 0.1


def test_correlation_of_a_constant_is_unknown():
    assert correlation(np.array([1.0, 2.0]), np.array([3.0, 5.0])) == pytest.approx(1.0)
    assert correlation(np.ones(2), np.array([3.0, 5.0])) is None


def test_the_whole_report():
    good = rated(scores=RATINGS, baseline=-RATINGS, raters=[[2, 2], [2, 2], [0, 0]])
    alone = rated(ratings=np.ones(3))
    report = reward_report({"good": good, "alone": alone}, min_gap=0.5, seed=0)
    one = report["sets"]["good"]
    assert report["mean_accuracy"] == 1.0
    assert one["num_pairs"] == 2
    assert one["accuracy"]["value"] == 1.0
    assert one["bag_of_words"]["value"] == 0.0
    assert one["longer_wins"]["value"] == 0.0
    assert one["one_human_rater"] == 1.0
    assert one["correlation"] == pytest.approx(1.0)
    assert [each["num_pairs"] for each in one["by_margin"]] == [0, 0, 1, 1, 0]
    assert report["sets"]["alone"] == {"num_texts": 3, "num_pairs": 0}
    assert reward_report({"alone": alone})["mean_accuracy"] is None


@pytest.mark.parametrize(
    ("min_gap", "edges"),
    [(0.0, [0.0, 0.5]), (0.1, [0.1, 0.5]), (0.5, [0.5, 1.0]), (1.2, [1.2, 1.5])],
)
def test_every_pair_that_counts_has_its_bin(min_gap, edges):
    ratings = np.array([0.0, 0.2, 0.5, 1.5, 4.5])
    spread = rated(
        ratings=ratings, scores=ratings, lengths=np.ones(5), scales=["s"] * 5, groups=["s"] * 5
    )
    one = reward_report({"x": spread}, min_gap=min_gap)["sets"]["x"]
    for bins in (one["by_margin"], one["by_length_difference"]):
        assert sum(each["num_pairs"] for each in bins) == one["num_pairs"]
    assert [one["by_margin"][0][end] for end in ("from", "to")] == edges


def test_pairs_are_resampled_whole():
    # Two pairs of one document: a text never occurs without its partner.
    pairs = rated(
        scores=np.array([1.0, 0.0, 1.0, 0.0]),
        ratings=np.array([1.0, 0.0, 1.0, 0.0]),
        lengths=np.ones(4),
        scales=["a", "a", "b", "b"],
        groups=["s"] * 4,
    )
    assert reward_report({"pairs": pairs})["sets"]["pairs"]["accuracy"] == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
    }


def test_rows_of_one_document_are_resampled_together():
    # Eight pairs, of which the model has every second one right: by pairs, of two documents.
    def interval(groups: list[str]) -> tuple[float, float]:
        pairs = rated(
            scores=np.array([1.0, 0.0, 0.0, 1.0] * 4),
            ratings=np.array([1.0, 0.0] * 8),
            lengths=np.ones(16),
            scales=[f"row {text // 2}" for text in range(16)],
            groups=groups,
        )
        found = reward_report({"pairs": pairs})["sets"]["pairs"]["accuracy"]
        assert found["value"] == 0.5
        return found["low"], found["high"]

    # Documents of one right and one wrong pair each: every sample is half right.
    assert interval([f"document {text // 4}" for text in range(16)]) == (0.5, 0.5)
    # Two documents, all right and all wrong: a quarter of the samples holds one of them alone.
    assert interval(["right", "right", "wrong", "wrong"] * 4) == (0.0, 1.0)
    low, high = interval([f"document {text // 2}" for text in range(16)])
    assert 0.0 < low < 0.5 < high < 1.0


def test_the_interval_of_pairs_is_that_of_independent_draws():
    # 400 pairs, 280 right. As a share of independent draws: 0.7 within 1.96 sqrt(0.7 0.3 / 400).
    generator = np.random.default_rng(0)
    right = generator.permutation(400) < 280
    pairs = rated(
        scores=np.stack([right, ~right], axis=1).astype(float).ravel(),
        ratings=np.array([1.0, 0.0] * 400),
        lengths=np.ones(800),
        scales=[f"row {text // 2}" for text in range(800)],
        groups=[f"document {text // 2}" for text in range(800)],
    )
    found = reward_report({"pairs": pairs})["sets"]["pairs"]["accuracy"]
    half = 1.96 * (0.7 * 0.3 / 400) ** 0.5
    assert found["value"] == pytest.approx(0.7)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.12)
