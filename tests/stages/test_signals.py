"""Real stages that are told to stop: they save, say so by their exit code, and go on exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stages.data
import stages.pretrain
import stages.tokenizer
from pipeline.checkpoint import open_artifact
from pipeline.config import load
from pipeline.stopping import STOPPED

SMOKE = ["--recipe=smoke", "--tracking=none", "--threads=1"]
STEPS = 200


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder of the smoke recipe up to the tokenizer, and pretrain made without a stop."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("data", "tokenizer"):
        module = getattr(stages, stage)
        module.run(load(module.Config, [*SMOKE, f"--run={folder}"], stage=stage))
    assert ended(started(folder)) == 0
    return folder


@pytest.fixture
def run_dir(parents, tmp_path):
    """A run folder of a test's own with the same parents."""
    for stage in ("data", "tokenizer"):
        shutil.copytree(parents / stage, tmp_path / stage)
    return tmp_path


def started(folder: Path, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    """The stage pretrain at work in processes of its own."""
    settings = [*SMOKE, f"--run={folder}", f"--training.steps={STEPS}", "--saving.every=0", *words]
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


def wait_for_rows(folder: Path, process: subprocess.Popen[str], *, count: int) -> None:
    metrics, deadline = folder / "pretrain" / "metrics.jsonl", time.monotonic() + 90
    while not metrics.is_file() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bytes(parents, run_dir, number):
    process = started(run_dir)
    wait_for_rows(run_dir, process, count=2)
    process.send_signal(number)
    assert ended(process) == STOPPED
    assert "which is saved; the same command goes on" in process.said
    (point,) = (run_dir / "pretrain" / "checkpoints").iterdir()
    assert 0 < json.loads((point / "point.json").read_text())["step"] < STEPS
    assert ended(started(run_dir)) == 0
    again = open_artifact(run_dir / "pretrain", kind="causal-lm")
    assert again.digest == open_artifact(parents / "pretrain", kind="causal-lm").digest


def test_a_deadline_saves_before_it_comes(run_dir):
    process = started(run_dir, f"--saving.deadline={time.time()}", "--saving.grace_seconds=1")
    assert ended(process) == STOPPED
    assert "the deadline is near: stopped after step 1, which is saved" in process.said


def test_two_processes_stop_after_the_same_step(run_dir):
    process = started(run_dir, processes=2)
    wait_for_rows(run_dir, process, count=2)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == STOPPED
    (point,) = (run_dir / "pretrain" / "checkpoints").iterdir()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in point.iterdir()}


def test_a_second_stage_on_the_same_folder_is_refused(run_dir):
    first = started(run_dir)
    wait_for_rows(run_dir, first, count=1)
    second = started(run_dir)
    assert ended(second) == 2
    assert f"is being worked on by process {first.pid}" in second.said
    first.send_signal(signal.SIGTERM)
    assert ended(first) == STOPPED
