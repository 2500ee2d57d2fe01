"""Real stages that are told to stop: they save, say so by their exit code, and go on exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import open_artifact
from pipeline.stopping import STOPPED
from tests.support import SMOKE, copy_corpus, make_corpus

STEPS = 160
"""Enough for a second stage to be refused while the first is at work."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder of the smoke recipe up to the tokenizer, and pretrain made without a stop."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder)
    assert ended(started(folder)) == 0
    return folder


@pytest.fixture
def run_dir(parents, tmp_path):
    """A run folder of a test's own with the same parents."""
    copy_corpus(parents, tmp_path)
    return tmp_path


def started(folder: Path, *, processes: int = 1) -> subprocess.Popen[str]:
    """The stage pretrain at work in processes of its own."""
    settings = [*SMOKE, f"--run={folder}", f"--training.steps={STEPS}", "--saving.every=0"]
    launch = ["stages.pretrain"]
    if processes > 1:
        launch = ["pipeline.launch", str(processes), "stages.pretrain"]
        settings += [f"--num_processes={processes}"]
    return subprocess.Popen(
        [sys.executable, "-m", *launch, *settings],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> int:
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said, said
    process.said = said
    return process.returncode


def lock_of(folder: Path) -> Path:
    return folder / ".pretrain.lock"


def rows(folder: Path) -> int:
    metrics = folder / "pretrain" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bytes(parents, run_dir):
    process = started(run_dir)
    wait_for(lambda: lock_of(run_dir).is_file() and lock_of(run_dir).read_text(), process)
    second = started(run_dir)  # on the same folder: it is refused, and the first goes on
    assert ended(second) == 2
    assert f"is being worked on by process {process.pid}" in second.said
    wait_for(lambda: rows(run_dir) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == STOPPED
    assert "which is saved; the same command goes on" in process.said
    (point,) = (run_dir / "pretrain" / "checkpoints").iterdir()
    assert 0 < json.loads((point / "point.json").read_text())["step"] < STEPS
    told = json.loads((point / "trainer_state.json").read_text())["stateful_callbacks"]
    assert not told["TrainerControl"]["args"]["should_training_stop"]  # as in a run without a stop
    assert ended(started(run_dir)) == 0
    again = open_artifact(run_dir / "pretrain", kind="causal-lm")
    assert again.digest == open_artifact(parents / "pretrain", kind="causal-lm").digest


def test_two_processes_stop_after_the_same_step(run_dir):
    process = started(run_dir, processes=2)
    wait_for(lambda: rows(run_dir) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == STOPPED
    (point,) = (run_dir / "pretrain" / "checkpoints").iterdir()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in point.iterdir()}
