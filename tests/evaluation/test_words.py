"""Targets, headline, card, gold score."""

import math

import pytest

from pipeline.evaluation.gold import gold_scores
from pipeline.evaluation.markdown import (
    equal_kl_sentence,
    headline,
    interval,
    results_markdown,
    table,
)
from pipeline.evaluation.targets import TARGETS, Target, figures, judged
from tests.evaluation.fakes import records
from tests.reporting.fakes import results_of


@pytest.fixture(scope="module")
def results():
    return results_of(records(30))


def test_gold_is_the_vader_compound():
    # VADER sums valences, great 3.1 here, and squashes them: 3.1 / sqrt(3.1^2 + 15) = 0.6249.
    great, nothing, bad = gold_scores(["great", "the table", "bad"])
    assert great == pytest.approx(3.1 / math.sqrt(3.1**2 + 15), abs=1e-4)
    assert nothing == 0.0
    assert bad < 0


@pytest.mark.parametrize(
    ("low", "high", "wanted", "inside", "outside"),
    [
        (0.85, None, "at least 0.85", 0.85, 0.849),
        (None, 8.0, "at most 8", 8.0, 8.01),
        (0.75, 1.25, "0.75 to 1.25", 1.0, 1.26),
    ],
)
def test_a_target_is_a_range_with_its_ends(low, high, wanted, inside, outside):
    target = Target(name="x", title="X", low=low, high=high)
    assert target.wanted == wanted
    assert target.met_by(inside)
    assert not target.met_by(outside)


def test_every_target_has_its_figure(results):
    rows = judged(figures(results), TARGETS)
    assert [row["name"] for row in rows] == [target.name for target in TARGETS]


def test_the_lead_over_the_bag_of_words_is_the_smallest(results):
    leads = [
        one["accuracy"]["value"] - one["bag_of_words"]["value"]
        for one in results["reward_model"]["sets"].values()
    ]
    assert len(leads) == 2
    assert figures(results)["reward_accuracy_over_baseline"] == min(leads)


def test_figures_that_are_unknown_are_left_out(results):
    bare = results | {"reward_model": {}, "equal_kl": None}
    found = figures(bare)
    assert "reward_accuracy" not in found
    assert "lead_over_best_of_n" not in found


def test_the_headline_names_win_rate_and_divergence(results):
    words = headline(
        {"gold_win_rate": 0.876, "gold_win_rate_low": 0.85, "gold_win_rate_high": 0.9, "kl": 5.123}
    )
    assert words == "PPO over SFT: gold win rate 0.876 (0.850 to 0.900) at KL 5.12 nats"


def test_a_cell_cannot_break_a_table():
    assert table(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |"


def test_an_interval_in_words():
    assert interval({"value": 0.5, "low": 0.25, "high": 0.75}, digits=2) == "0.50 (0.25 to 0.75)"


@pytest.mark.parametrize(
    ("lead", "within", "words"),
    [
        (0.1, True, "PPO beats best-of-n at its own KL of 1.50 nats: gold win rate +0.100"),
        (-0.1, True, "PPO does not beat best-of-n at its own KL"),
        (0.1, False, "PPO beats best-of-16, the largest measured, although its KL of 1.50 nats"),
    ],
)
def test_the_verdict_on_best_of_n(lead, within, words):
    equal = {
        "kl": 1.5,
        "best_of_n": {"value": 0.7, "low": 0.6, "high": 0.8},
        "difference": {"value": lead, "low": lead - 0.05, "high": lead + 0.05},
        "within_range": within,
        "largest_n": 16,
    }
    assert equal_kl_sentence(equal).startswith(words)
    assert equal_kl_sentence(None) == "Best-of-n was not measured."


def test_the_card_holds_targets_policies_and_control(results):
    card = results_markdown(results)
    for words in ("| Gold win rate over SFT |", "| distinct-2 |", "| 4 | 0.64 |", "PPO "):
        assert words in card
    assert "| perplexity on held-out text (the alignment tax) | 80.00 | 92.00 |" in card
    assert figures(results)["text_perplexity_ratio"] == 1.15


def test_the_card_holds_a_recipe_to_its_own_ranges(results):
    card = results_markdown(results | {"targets": {"kl": [0.001, 0.002]}})
    assert "| KL to SFT, nats per response | 0.001 to 0.002 |" in card
    assert "| EOS rate | at least 0.95 |" in card


def test_a_run_without_text_has_no_alignment_tax(results):
    bare = results | {"alignment_tax": None}
    assert "held-out text" not in results_markdown(bare)
    assert "text_perplexity_ratio" not in figures(bare)
