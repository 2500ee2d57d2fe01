"""What the page is told: overview, curves of one run and of several, samples, differences."""

import json

import pytest

from pipeline.dashboard.views import LONGEST_TEXT, MOST_COMPARED, Unknown, Views
from tests.dashboard.runs import finished, held, log, trained


@pytest.fixture
def views(tmp_path):
    """Two runs: one finished, one at work since a moment ago."""
    finished(tmp_path / "old" / "evaluate", summary={"gold_win_rate": 0.9, "kl": 5.0, "other": 1})
    ppo = finished(tmp_path / "old" / "ppo", summary={"updates": 3}, kl={"coef": 0.1}, seed=1)
    trained(ppo, steps=3, of=3)
    finished(tmp_path / "old" / "sft", run="x")
    trained(tmp_path / "new" / "ppo", steps=2, of=3)
    held(tmp_path / "new" / "ppo", since=2e9)
    return Views(tmp_path)


def test_runs_at_work_come_first(views):
    told = views.overview()
    assert [(run["name"], run["running"]) for run in told["runs"]] == [
        ("new", True),
        ("old", False),
    ]
    assert told["runs"][1]["headline"] == {"gold_win_rate": 0.9, "kl": 5.0}
    states = {stage["name"]: stage["state"] for stage in told["runs"][0]["stages"]}
    assert states["ppo"] == "running"
    json.dumps(told, allow_nan=False)


def test_curves_of_one_run_and_of_two(views):
    [loss, kl, seconds] = views.curves(["old"], "ppo")["charts"]
    assert [one["title"] for one in (loss, kl, seconds)] == ["train/loss", "policy/kl", "time/s"]
    assert loss["lines"] == [
        {"run": "old", "label": "train", "x": [1.0, 2.0, 3.0], "y": [1.0, 0.5, 0.333333]}
    ]
    both = views.curves(["old", "new"], "ppo")["charts"][1]
    assert [(line["run"], line["y"]) for line in both["lines"]] == [
        ("old", [1.0, 2.0, 3.0]), ("new", [1.0, 2.0]),
    ]  # fmt: skip


def test_runs_that_lack_the_stage_have_no_curves(views, tmp_path):
    finished(tmp_path / "many" / "seeds", summary={"seeds": 3})
    trained(tmp_path / "new" / "reward_guard", steps=2, of=3)
    for names, stage in ((["old", "new"], "reward_guard"), (["many", "new"], "ppo")):
        drawn = views.curves(names, stage)["charts"]
        assert {line["run"] for chart in drawn for line in chart["lines"]} == {"new"}
        assert views.comparison(names, stage)["runs"][0]["state"] == "missing"
    with pytest.raises(Unknown):
        views.curves(["nowhere", "new"], "ppo")


def test_a_metric_without_a_course_has_no_chart(views, tmp_path):
    log(tmp_path / "old" / "sft", "metrics.jsonl", {"step": 1, "a": 1.0})
    assert views.curves(["old"], "sft") == {"charts": [], "remarks": []}


def test_what_is_damaged_is_told_with_the_runs_name(views, tmp_path):
    with (tmp_path / "new" / "ppo" / "metrics.jsonl").open("a") as file:
        file.write("{\n")
    remark = "metrics.jsonl: line 3 damaged, left out"
    assert views.curves(["new"], "ppo")["remarks"] == [remark]
    assert views.curves(["old", "new"], "ppo")["remarks"] == [f"new: {remark}"]
    many = views.curves(["old"] * (MOST_COMPARED + 1), "ppo")
    assert many["remarks"] == [
        f"only the first {MOST_COMPARED} of {MOST_COMPARED + 1} runs are shown"
    ]


def test_settings_are_compared_where_they_are_known(views, tmp_path):
    told = views.comparison(["old", "new"], "ppo")
    assert told["stages"] == ["sft", "ppo", "evaluate"]
    assert told["differing"] == []
    assert [run["state"] for run in told["runs"]] == ["finished", "running"]
    assert told["runs"][1]["figures"] == {"train/loss": 0.5, "policy/kl": 2}
    point = tmp_path / "new" / "ppo" / "checkpoints" / "step-2"
    point.mkdir(parents=True)
    (point / "point.json").write_text(json.dumps({"config": {"kl": {"coef": 0.2}, "seed": 1}}))
    told = views.comparison(["old", "new"], "ppo")
    assert told["differing"] == ["kl.coef"]
    assert told["runs"][1]["settings"] == {"kl.coef": 0.2, "seed": 1}
    (point / "point.json").write_text("[")
    assert views.comparison(["old", "new"], "ppo")["differing"] == []
    missing = views.comparison(["old", "new"], "reward")["runs"]
    assert [(run["name"], run["state"]) for run in missing] == [
        ("old", "missing"),
        ("new", "missing"),
    ]


def test_a_finished_stage_tells_its_figures(views):
    ppo = next(one for one in views.run("old")["stages"] if one["name"] == "ppo")
    assert (ppo["figures"], ppo["minutes"], ppo["commit"]) == ({"updates": 3}, 1.5, "abc")
    assert ppo["settings"] == {"kl.coef": 0.1, "seed": 1}


def test_samples_of_the_newest_step_and_of_another(views, tmp_path):
    folder = tmp_path / "new" / "ppo"
    assert views.samples("new", "ppo", None) == {
        "steps": [],
        "step": None,
        "num_rows": 0,
        "rows": [],
    }
    row = {
        "prompt": "p",
        "ppo": {"text": "x" * 9999, "gold": float("nan")},
        "draws": [{"text": "y"}],
    }
    log(folder, "samples.jsonl", {"step": 1, "prompt": "q", "score": 0.5}, {"step": 2, **row})
    told = views.samples("new", "ppo", None)
    assert (told["steps"], told["step"], told["num_rows"]) == ([1, 2], 2, 1)
    assert told["rows"][0]["texts"]["prompt"] == "p"
    assert len(told["rows"][0]["texts"]["ppo.text"]) == LONGEST_TEXT + 2
    assert not [name for name in told["rows"][0]["texts"] if name.startswith("draws")]
    json.dumps(told, allow_nan=False)
    assert views.samples("new", "ppo", 1.0)["rows"] == [
        {"texts": {"prompt": "q"}, "numbers": {"score": 0.5}}
    ]
    assert views.samples("new", "ppo", 7.0)["step"] == 2


def test_what_is_not_there_is_unknown(views):
    for ask in (
        lambda: views.run("nowhere"),
        lambda: views.run("../old"),
        lambda: views.curves(["old"], "checkpoints"),
        lambda: views.samples("old", "../new/ppo", None),
        lambda: views.page_of("old", "index.html"),
    ):
        with pytest.raises(Unknown):
            ask()


def test_logs_that_were_not_asked_for_lately_are_forgotten(views, monkeypatch):
    monkeypatch.setattr("pipeline.dashboard.views.MOST_LOGS", 2)
    views.curves(["old"], "ppo")
    views.curves(["new"], "ppo")
    assert [path.parent.parent.name for path in views._logs] == ["new", "new"]
