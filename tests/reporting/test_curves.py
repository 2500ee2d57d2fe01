"""Curves from metrics.jsonl, and the charts of an evaluation."""

import base64

import pytest

from pipeline.reporting.charts import Series, bin_chart, chart
from pipeline.reporting.curves import charts_of, curves
from pipeline.reporting.figures import bin_name, calibration_note, frontier, reward_charts
from tests.evaluation.fakes import records
from tests.reporting.fakes import results_of


def drawing(one):
    return base64.b64decode(one.source.partition(",")[2]).decode()


def test_curves_leave_out_what_is_no_finite_number():
    rows = [
        {"step": 1, "train/loss": 2.0, "note": "x"},
        {"step": 2, "train/loss": float("nan"), "validation/loss": 3.0},
        {"step": 3, "train/loss": 1.0},
    ]
    assert curves(rows) == {"train/loss": [(1, 2.0), (3, 1.0)], "validation/loss": [(2, 3.0)]}


def test_training_and_validation_share_a_chart_and_single_points_have_none():
    rows = [
        {"step": 1, "train/loss": 2.0, "validation/loss": 2.5, "policy/loss": 1.0},
        {"step": 2, "train/loss": 1.5, "policy/loss": 0.5, "train/grad_norm": 1.0},
        {"step": 3, "train/grad_norm": 2.0},
    ]
    found = charts_of(rows)
    assert [one.title for one in found] == ["loss", "policy/loss", "train/grad norm"]
    assert found[0].description == "loss: train, validation by step"


def test_a_chart_is_the_same_every_time_and_holds_its_words():
    series = [Series(label="SFT", x=[0.0, 1.0], y=[1.0, 2.0], low=[0.5, 1.5], high=[1.5, 2.5])]
    first, second = (chart("Gold <1>", series=series, x_label="KL") for _ in range(2))
    assert first == second
    assert "Gold &lt;1&gt;" in drawing(first)


def test_a_bin_without_pairs_stays_empty():
    found = bin_chart(
        "By gap", bins=["a", "b"], rows={"x": [0.5, None], "y": [None, None]}, x_label="gap"
    )
    assert "</svg>" in drawing(found)


@pytest.mark.parametrize(
    ("low", "high", "text"), [(0.5, 1.0, "0.5 to 1"), (3.0, None, "≥ 3"), (None, -10.0, "< -10")]
)
def test_bins_are_named_by_their_range(low, high, text):
    assert bin_name({"from": low, "to": high}) == text


def course(group):
    return {
        f"{group}/kl": [(0.0, 0.0), (1.0, 1.0), (3.0, 2.0)],
        f"{group}/score": [(0.0, 0.1), (1.0, 0.9), (2.0, 1.5)],
    }


@pytest.mark.parametrize(
    ("group", "label"), [("validation", "PPO on validation"), ("objective", "PPO while training")]
)
def test_the_proxy_is_drawn_along_training_and_gold_is_not(group, label):
    gold, wins, reward = frontier(results_of(records(20)), course=course(group))
    assert label in reward.description
    for one in (gold, wins):
        assert one.description.count("PPO") == 1
        assert "best of n" in one.description


def test_without_a_course_or_control_the_policies_remain():
    results = results_of(records(20)) | {"best_of_n": []}
    for one in frontier(results, course={}):
        assert one.description.endswith(": SFT, PPO by KL to SFT, nats per response")


def test_what_calibration_is_held_against_is_told_of_every_set():
    sets = {
        name: {"num_pairs": 3, "calibration": {"observed_by": by} if by else {}}
        for name, by in (("tweets", "raters"), ("pairs", "order"), ("former", None))
    }
    assert calibration_note({"sets": sets}) == (
        "Calibration holds the probability of the model's choice against the share of raters who "
        "agree, one of each text and equal ratings half (tweets); whether the order of the mean "
        "ratings agrees (pairs, former)."
    )


def test_reward_charts_need_comparable_pairs():
    assert reward_charts({}) == []
    assert reward_charts({"sets": {"x": {"num_texts": 3, "num_pairs": 0}}}) == []
    report = results_of(records(6))["reward_model"]
    assert [one.title for one in reward_charts(report)] == [
        "Calibration",
        "Accuracy by rating gap",
        "Accuracy by length difference",
    ]
