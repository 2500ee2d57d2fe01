"""The benchmark of time to quality: its clock, its verdict, its ratios."""

import json

import pytest

from benchmarks.time_to_quality import __main__ as benchmark
from benchmarks.time_to_quality import snapshots
from benchmarks.time_to_quality.snapshots import SECONDS, Snapshots


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(snapshots.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_saving_is_off_the_clock_and_the_limit_is_of_training_alone(tmp_path, clock):
    saved = []

    def save(folder):
        saved.append(folder.name)
        clock(50)

    run = Snapshots(tmp_path / "run", interval=3, limit=9)
    goes_on = []
    for _ in range(5):
        clock(2)
        goes_on.append(run.after_update(save))
    assert goes_on == [True, True, True, True, False]
    assert saved == ["0", "1"]
    assert json.loads((tmp_path / "run" / SECONDS).read_text()) == [
        {"seconds": 4.0, "updates": 2},
        {"seconds": 8.0, "updates": 4},
    ]


def curve(*looks):
    return [
        {"seconds": seconds, "updates": number + 1, "gold_win_rate": rate, "distinct_2": variety}
        for number, (seconds, rate, variety) in enumerate(looks)
    ]


GOOD = curve((10.0, 0.6, 1.0), (20.0, 0.8, 0.8), (30.0, 0.75, 0.85), (40.0, 0.9, 0.9))
NEVER = curve((50.0, 0.6, 1.0), (90.0, 0.7, 0.9))


def test_quality_is_reached_where_both_figures_suffice():
    assert benchmark.reached(GOOD)["seconds"] == 30.0
    assert benchmark.reached(NEVER) is None


def test_ratios_say_at_least_where_the_other_side_never_arrived():
    results = [
        {"side": side, "seed": seed, "curve": looks}
        for side, seed, looks in (
            ("ours", 1, GOOD), ("ours", 2, GOOD), ("ours", 3, NEVER),
            ("trl", 1, curve((60.0, 0.8, 0.9))), ("trl", 2, curve((90.0, 0.8, 0.9))),
            ("trl", 3, GOOD), ("trl_defaults", 1, NEVER),
        )
    ]  # fmt: skip
    assert benchmark.ratios(results) == [
        "trl / ours: 2.5 (2.0 to 3.0), 2 seeds",
        "trl_defaults / ours: at least 3.0 (3.0 to 3.0), 1 seeds",
    ]


def test_a_row_of_the_table():
    result = {"side": "trl_defaults", "seed": 1, "curve": NEVER}
    assert benchmark.row(result) == (
        "| trl, defaults | 1 | not in 90 | of 2 none | 0.700 | 0.90 | 90 |"
    )
    result = {"side": "ours", "seed": 2, "curve": GOOD}
    assert benchmark.row(result) == "| ours | 2 | 30 | 3 | 0.900 | 0.90 | 40 |"


def test_the_peer_gets_the_recipes_settings():
    config = benchmark.load(benchmark.Config, ["--recipe=cpu"], stage="ppo")
    given = benchmark.same_settings(config)
    assert given["total_episodes"] == config.updates * config.prompts_per_update
    assert config.prompts_per_update // given["num_mini_batches"] == config.minibatch_size
    assert given["learning_rate"] == config.optimisation.learning_rate
    assert given["lam"] == config.reward.lam
    assert given["missing_eos_penalty"] == 1.0


def test_a_missing_environment_is_one_line(monkeypatch, tmp_path):
    words = ["bench", f"--peer={tmp_path / 'python'}"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="bench-quality: --peer=.* names no interpreter"):
        benchmark.main()
