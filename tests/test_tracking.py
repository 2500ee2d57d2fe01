"""Experiment trackers: a run that continues, tables, files, and nothing without being asked."""

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import accelerate.tracking
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.checkpoint import begin
from pipeline.circumstances import Usage
from pipeline.config import StageConfig
from pipeline.errors import UserError
from pipeline.tracking import Tracker, open_tracker

ATTACK = "a|b\n<script>*x*</script>"


class FakeRun:
    """What of a tracker's run is read and called; remembers what it was told."""

    def __init__(self, settings):
        folder = Path(
            settings.get("dir", "."), "wandb", f"offline-run-1-{settings.get('id')}", "files"
        )
        self.dir, self.id, self.saved, self.summary = str(folder), settings.get("id"), [], {}
        self.offline = os.environ.get("WANDB_MODE") == "offline"
        folder.mkdir(parents=True, exist_ok=True)

    def define_metric(self, name, step_metric):
        self.defined = (name, step_metric)

    def save(self, path, base_path, policy):
        self.saved.append(Path(path).read_text())


class FakeTracker:
    """Stands in for Accelerate's trackers; remembers what it was told."""

    sessions: ClassVar[list["FakeTracker"]] = []
    failing: ClassVar[list[Exception]] = []

    def __init__(self, run_name, **settings):
        self.project, self.settings, self.rows, self.config = run_name, settings, [], None
        self.run = FakeRun(settings)

    def start(self):
        if FakeTracker.failing:
            raise FakeTracker.failing.pop()
        FakeTracker.sessions.append(self)

    def store_init_configuration(self, config):
        self.config = config

    def log(self, values, step=None):
        self.rows.append((values.get("step", step), values))

    def finish(self):
        self.finished = True


@pytest.fixture(autouse=True)
def sessions(tmp_path, monkeypatch):
    """The sessions of fake trackers without a key, in a checkout of a test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(accelerate.tracking, "WandBTracker", FakeTracker)
    monkeypatch.setattr(wandb, "Table", lambda columns, data: (columns, data))
    FakeTracker.sessions, FakeTracker.failing = [], []
    return FakeTracker.sessions


class Killed(Exception):
    """Stands for the end of the process."""


def session(steps: int, *, stop: int, **settings) -> None:
    """A stage that logs two rows a step, saves at step 2, samples at 4, and dies after `stop`."""
    with begin(StageConfig(**settings), stage="sft", kind="causal-lm", parents={}) as run:
        run.total_steps = steps
        point = run.latest_point()
        for step in range(point[0] + 1 if point else 1, steps + 1):
            run.log(step, {"train/loss": float(step)})
            if step > stop:
                raise Killed
            run.log_timings(step, {"time/seconds": 1.0})
            if step == 2:
                run.save_point(step, lambda path: (path / "a").write_text("a"))
            if step == 4:
                rows = [
                    {"prompt": ATTACK, "score": 0.5, "ended": True},
                    {"prompt": "c", "score": 1},
                ]
                run.log_samples(step, rows)
        run.finish("done", chosen={}, summary={"loss": {"last": 0.5}}, card="")


def killed(steps: int, *, stop: int, **settings) -> None:
    """The same, which does not reach its end."""
    with pytest.raises(Killed):
        session(steps, stop=stop, **settings)


def steps_of(tracker, name):
    """The steps at which a metric was sent."""
    return [step for step, values in tracker.rows if name in values]


def test_a_run_that_goes_on_continues_the_same_tracked_run_and_sends_no_step_twice(
    sessions, caplog
):
    killed(6, stop=4)
    killed(6, stop=3)  # earlier than the first: what is sent after 4 counts from then on
    with caplog.at_level("INFO"):
        session(6, stop=9)
    assert len({tracker.settings["id"] for tracker in sessions}) == 1
    assert {tracker.settings["resume"] for tracker in sessions} == {"allow"}
    assert [steps_of(tracker, "train/loss") for tracker in sessions] == [[1, 2, 3, 4, 5], [], [6]]
    assert [steps_of(tracker, "time/seconds") for tracker in sessions] == [[1, 2, 3, 4], [], [5, 6]]
    assert [steps_of(tracker, "samples") for tracker in sessions] == [[4], [], []]
    logged = Path("runs/cpu/sft/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert f"wandb sync runs/cpu/wandb/*-{sessions[2].run.id}" in caplog.text


def test_a_run_made_anew_or_with_other_settings_is_another_run(sessions):
    session(3, stop=9)
    session(3, stop=9, force=True)
    killed(1, stop=0, force=True)  # before its first resume point: begins anew
    session(3, stop=9, force=True)
    session(3, stop=9, force=True, seed=2)
    assert len({tracker.settings["id"] for tracker in sessions}) == 5
    assert steps_of(sessions[3], "train/loss") == [1, 2, 3]
    assert sessions[3].settings["group"] == sessions[0].settings["group"]


def test_a_record_that_is_damaged_begins_another_run(sessions):
    killed(6, stop=3)
    Path("runs/cpu/.sft.tracked.json").write_text("{")
    session(6, stop=9)
    assert sessions[0].settings["id"] != sessions[1].settings["id"]
    assert steps_of(sessions[1], "train/loss") == [3, 4, 5, 6]


def test_the_group_is_recipe_and_lineage(sessions):
    parents = {"data": "d" * 64, "sft": "e" * 64}
    for stage in ("reward", "ppo"):
        open_tracker(
            StageConfig(recipe="mine", run="runs/x", seed=7),
            stage=stage,
            key="0" * 64,
            parents=parents,
        )
    first, second = (tracker.settings for tracker in sessions)
    assert first["group"] == second["group"] == "mine-dddddddd"
    assert (first["name"], first["job_type"]) == ("x-reward", "reward")
    assert first["id"] != second["id"]
    assert sessions[0].config["parents"] == parents
    assert sessions[0].config["seed"] == 7
    assert "tracking" not in sessions[0].config


def test_wandb_gets_table_manifest_and_figures(sessions):
    session(4, stop=9, tracking="wandb")
    [tracker] = sessions
    columns, data = tracker.rows[-1][1]["samples"]
    assert columns == ["prompt", "score", "ended"]
    assert data == [[ATTACK, 0.5, "true"], ["c", 1, ""]]
    assert tracker.run.defined == ("*", "step")
    assert tracker.run.saved == [Path("runs/cpu/sft/manifest.json").read_text()]
    assert tracker.run.summary == {"loss.last": 0.5}
    assert {"system/memory_gib", "system/busy_cores"} <= set(tracker.rows[1][1])


def test_memory_of_a_gpu_is_told_where_there_is_one(monkeypatch):
    import torch

    assert "system/peak_gpu_memory_gib" not in Usage().since_last() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    assert Usage().since_last()["system/peak_gpu_memory_gib"] == 1.5


def test_a_server_that_does_not_answer_stops_wandb_and_not_auto(sessions, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    FakeTracker.failing = [wandb.errors.CommError("no answer\nmore")]
    session(3, stop=9)
    assert "wandb did not start (no answer): it goes on offline" in caplog.messages
    assert len(sessions) == 1
    monkeypatch.delenv("WANDB_MODE")
    FakeTracker.failing = [wandb.errors.CommError("no answer")]
    with pytest.raises(UserError, match=r"wandb did not start \(no answer\)\. Set WANDB_MODE=offl"):
        session(3, stop=9, force=True, tracking="wandb")


def test_tensorboard_reads_back_what_was_sent(caplog):
    killed(6, stop=3, tracking="tensorboard")
    with caplog.at_level("INFO"):
        session(6, stop=9, tracking="tensorboard")
    line = next(one for one in caplog.messages if "tensorboard --logdir runs/cpu/ten" in one)
    program = line.removeprefix("to see it: ").split()[0]
    assert program == "tensorboard" or Path(program).is_file()  # where no venv is activated
    [folder] = Path("runs/cpu/tensorboard").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [one.value for one in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [one.step for one in events.Scalars("system/memory_gib")] == [1, 2, 3, 4, 5, 6]
    texts = {
        name: events.Tensors(f"{name}/text_summary") for name in ("samples", "manifest", "config")
    }
    assert {name: [one.step for one in found] for name, found in texts.items()} == {
        "samples": [4], "manifest": [0], "config": [0],
    }  # fmt: skip
    table = texts["samples"][0].tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| prompt | score | ended |"
    assert table[2] == r"| a\|b \<script\>\*x\*\</script\> | 0\.5 | true |"
    manifest = texts["manifest"][0].tensor_proto.string_val[0].decode()
    assert json.loads(manifest) == json.loads(Path("runs/cpu/sft/manifest.json").read_text())


def test_several_at_once(sessions):
    session(3, stop=9, tracking="tensorboard, auto")
    assert steps_of(sessions[0], "train/loss") == [1, 2, 3]
    assert list(Path("runs/cpu/tensorboard").rglob("*.tfevents.*"))


def test_a_tracker_that_is_missing_is_told_with_the_command(monkeypatch):
    session(3, stop=9, tracking="none")
    before = Path("runs/cpu/sft/manifest.json").read_text()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = (
        rf"tracking: trackio is not installed\. Run: {sys.executable} -m pip install -c constraints"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=line + r"\.txt -e '\.\[trackio\]'"):
            session(3, stop=9, tracking="trackio", force=True)
    assert Path("runs/cpu/sft/manifest.json").read_text() == before
    assert not list(Path("runs/cpu").glob(".sft.former"))


def test_nothing_is_tracked_when_told_so(sessions):
    for config, stage in ((StageConfig(tracking="none"), "sft"), (StageConfig(), "data")):
        assert open_tracker(config, stage=stage, key="0" * 64, parents={})._boards == ()
    session(3, stop=9, tracking="none")
    assert not list(Path("runs/cpu").glob(".sft.tracked.json"))
    tracker = Tracker()
    tracker.log(1, {"a": 1.0})
    tracker.table(1, [{"a": "b"}])
    tracker.finish()
    assert sessions == []
