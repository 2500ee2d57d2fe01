"""The table over seeds."""

import json

import pytest

from pipeline.evaluation.seeds import (
    pooled_win_rate,
    run_figures,
    seed_table,
    seeds_markdown,
    t_interval,
)
from pipeline.evaluation.statistics import Estimate
from tests.reporting.fakes import fake_run

RUNS = {
    1: {"gold_win_rate": 0.90, "gold_win_rate_low": 0.88, "kl": 5.0, "gold_ppo": 0.7},
    2: {"gold_win_rate": 0.86, "gold_win_rate_low": 0.84, "kl": 9.0, "gold_ppo": 0.6},
    3: {"gold_win_rate": 0.88, "gold_win_rate_low": 0.86, "kl": 7.0},
}
POOLED = Estimate(value=0.88, low=0.86, high=0.9)


def rows():
    return {row["name"]: row for row in seed_table(RUNS, pooled=POOLED, ranges={})}


def test_students_interval_by_hand():
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.3027: half width 4.3027 / sqrt(3) = 2.4842.
    found = t_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.value, found.low, found.high) == (
        2.0,
        pytest.approx(2 - 2.4842, abs=1e-4),
        pytest.approx(2 + 2.4842, abs=1e-4),
    )


def test_one_seed_has_no_interval():
    assert t_interval([1.0]) is None
    row = seed_table({4: {"kl": 5.0}}, pooled=POOLED, ranges={})[0]
    assert (row["mean"], row["low"], row["high"], row["met"]) == (5.0, None, None, True)


def test_targets_are_held_against_the_mean():
    assert rows()["kl"]["mean"] == pytest.approx(7.0)
    assert rows()["kl"]["met"] is True
    assert rows()["gold_win_rate"]["mean"] == pytest.approx(0.88)


@pytest.mark.parametrize(("low", "met"), [(0.81, True), (0.79, False)])
def test_the_start_of_the_interval_is_that_of_the_pooled_bootstrap(low, met):
    pooled = Estimate(value=0.88, low=low, high=0.9)
    found = {row["name"]: row for row in seed_table(RUNS, pooled=pooled, ranges={})}
    assert found["gold_win_rate_low"]["met"] is met
    # 0.88 - 4.3027 * 0.02 / sqrt(3), the interval over seeds, is shown beside it.
    assert found["gold_win_rate"]["low"] == pytest.approx(0.8303, abs=1e-4)


def test_a_recipe_may_have_ranges_of_its_own():
    found = {
        row["name"]: row for row in seed_table(RUNS, pooled=POOLED, ranges={"kl": [None, 5.0]})
    }
    assert (found["kl"]["wanted"], found["kl"]["met"]) == ("at most 5", False)
    assert found["gold_win_rate"]["wanted"] == "at least 0.85"


def write_samples(folder, golds):
    (folder / "evaluate").mkdir(parents=True)
    said = {"text": "hello", "reward": 0.0}
    rows = [
        {
            "group": f"chat-{i // 2}",
            "prompt": "hi",
            "kl": 0.0,
            "ppo": said | {"gold": ours},
            "sft": said | {"gold": theirs},
        }
        for i, (ours, theirs) in enumerate(golds)
    ]
    (folder / "evaluate" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_seeds_are_pooled_over_conversations(tmp_path):
    # Wins 1, 1, 0.5, 0 and 1, 0, 0, 0: 3.5 of 8. Each conversation holds two prompts a seed.
    first = write_samples(tmp_path / "1", [(1.0, 0.0), (1.0, 0.5), (0.3, 0.3), (0.0, 1.0)])
    second = write_samples(tmp_path / "2", [(1.0, 0.0), (0.0, 0.5), (0.1, 0.3), (0.0, 1.0)])
    found = pooled_win_rate([first, second])
    assert found.value == pytest.approx(3.5 / 8)
    # Two conversations with means 3/4 and 1/8: a sample is either one, the other, or both.
    assert (found.low, found.high) == (pytest.approx(1 / 8), pytest.approx(3 / 4))


def test_a_figure_that_a_seed_lacks_is_a_dash():
    assert rows()["gold_ppo"]["values"] == {"1": 0.7, "2": 0.6, "3": None}
    table = seeds_markdown(seed_table(RUNS, pooled=POOLED, ranges={}), pooled=POOLED, recipe="cpu")
    assert "| gold ppo | 0.700 | 0.600 | - | 0.650" in table
    assert "Student's t over seeds" in table
    assert "0.880 (0.860 to 0.900)" in table


def test_targets_come_first_in_their_order():
    names = [row["name"] for row in seed_table(RUNS, pooled=POOLED, ranges={})]
    assert names == ["gold_win_rate", "gold_win_rate_low", "kl", "gold_ppo"]


def test_minutes_add_up_and_memory_is_the_largest(tmp_path):
    run = fake_run(tmp_path / "run", report=True)
    found = run_figures(run, summary={"kl": 1.0})
    assert found["kl"] == 1.0
    assert 0 <= found["minutes"] < 1
    assert found["peak_memory_gib"] > 0
