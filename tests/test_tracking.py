"""Experiment trackers: a run that continues, and nothing without being asked."""

import json
from pathlib import Path
from typing import ClassVar

import accelerate.tracking
import pytest

from pipeline.checkpoint import begin
from pipeline.config import StageConfig
from pipeline.tracking import Tracker, open_tracker


class FakeRun:
    """What of a wandb run is read."""

    def __init__(self, folder: str, name: str) -> None:
        self.dir, self.id = f"{folder}/wandb/offline-run-1-{name}/files", name


class FakeWandB:
    """Stands in for Accelerate's tracker; remembers what it was told."""

    sessions: ClassVar[list["FakeWandB"]] = []

    def __init__(self, run_name, **settings):
        self.settings, self.rows, self.config = settings, [], None
        self.run = FakeRun(settings["dir"], settings["id"])
        FakeWandB.sessions.append(self)

    def start(self):
        pass

    def store_init_configuration(self, config):
        self.config = config

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture(autouse=True)
def sessions(tmp_path, monkeypatch):
    """The sessions of a fake wandb without a key, in a checkout of a test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerate.tracking, "WandBTracker", FakeWandB)
    FakeWandB.sessions = []
    yield FakeWandB.sessions
    monkeypatch.delenv("WANDB_MODE", raising=False)


class Killed(Exception):
    """Stands for the end of the process."""


def session(steps: int, *, stop: int, **settings) -> None:
    """A stage that logs two rows a step, saves at step 2, and dies after `stop`."""
    with begin(StageConfig(**settings), stage="sft", kind="causal-lm", parents={}) as run:
        point = run.latest_point()
        for step in range(point[0] + 1 if point else 1, steps + 1):
            run.log(step, {"train/loss": float(step)})
            if step > stop:
                raise Killed
            run.log_timings(step, {"time/seconds": 1.0})
            if step == 2:
                run.save_point(step, lambda path: (path / "a").write_text("a"))
        run.finish("done", chosen={}, summary={}, card="")


def test_a_run_that_goes_on_continues_the_same_tracked_run_and_sends_no_step_twice(
    sessions, caplog
):
    with pytest.raises(Killed):
        session(6, stop=3)
    with caplog.at_level("INFO"):
        session(6, stop=9)
    first, second = sessions
    assert first.settings["id"] == second.settings["id"]
    assert second.settings["resume"] == "allow"
    assert [step for step, _ in first.rows] == [1, 1, 2, 2, 3, 3, 4]
    assert [step for step, _ in second.rows] == [4, 4, 5, 5, 6, 6]
    logged = Path("runs/cpu/sft/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert f"wandb sync runs/cpu/wandb/*-{second.run.id}" in caplog.text


def test_a_run_made_anew_begins_at_its_first_step(sessions):
    session(3, stop=9)
    session(3, stop=9, force=True)
    assert [step for step, _ in sessions[1].rows] == [1, 1, 2, 2, 3, 3]


def test_nothing_is_tracked_when_told_so(sessions):
    assert open_tracker(StageConfig(tracking="none"), stage="sft", digest="0" * 64)._tracker is None
    assert open_tracker(StageConfig(), stage="data", digest="0" * 64)._tracker is None
    Tracker().log(1, {"a": 1.0})
    Tracker().finish()
    assert sessions == []
