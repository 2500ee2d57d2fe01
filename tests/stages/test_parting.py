"""Real stages on several processes, one of which fails: all end, with its words."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import stages.data
import stages.pretrain
import stages.reward
import stages.sft
import stages.tokenizer
from pipeline.config import load
from tests.support import SMOKE

FEW = ["--training.steps=2", "--training.warmup_steps=0", "--saving.every=0"]
ENDLESS = {
    "sft": ["--training.steps=100000"],
    "reward": ["--training.steps=100000"],
    "ppo": ["--updates=10000"],
}
SECONDS = 30
"""Until all have ended; on a busy machine it took 2 to 11."""

FAULTY = """
import os
if os.environ.get("RANK") == "1":
    import torch
    real, calls = torch.nn.functional.embedding, []

    def embedding(*args, **kwargs):
        calls.append(1)
        if len(calls) == 30:
            from pipeline.errors import UserError
            raise {error}
        return real(*args, **kwargs)

    torch.nn.functional.embedding = embedding
"""
"""Process 1 fails in the middle of its work, in a place that every model passes."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder with the smoke recipe up to the reward model, trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("data", "tokenizer", "pretrain", "sft", "reward"):
        module = getattr(stages, stage)
        few = [] if stage in ("data", "tokenizer") else FEW
        module.run(load(module.Config, [*SMOKE, *few, f"--run={folder}"], stage=stage))
    return folder


def started(parents: Path, folder: Path, stage: str, *, error: str = "") -> subprocess.Popen[str]:
    """A stage that would go on for long, on two processes."""
    for parent in parents.iterdir():
        if parent.is_dir() and parent.name != stage:
            shutil.copytree(parent, folder / parent.name)
    (folder / "sitecustomize.py").write_text(FAULTY.format(error=error) if error else "")
    words = [f"stages.{stage}", *SMOKE, *ENDLESS[stage], f"--run={folder}"]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.launch", "2", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd())])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def last_lines(said: str, count: int) -> list[str]:
    """The last lines without the bars, which end in no line break."""
    return [line.split("\r")[-1].split("\x1b[A")[-1] for line in said.splitlines()[-count:]]


def test_a_mistake_of_one_process_ends_all_with_its_words(parents, tmp_path):
    process = started(parents, tmp_path, "ppo", error='UserError("only here")')
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    ours, of_launcher = last_lines(said, 2)
    assert re.search(r"ppo \(process 1 of 2\): (\w[\w ]+: )?only here$", ours), ours
    assert of_launcher == "process 1 of 2 failed, and the others were ended"
    assert "Traceback" not in said


def test_an_error_of_one_process_leaves_its_traceback_alone(parents, tmp_path):
    process = started(parents, tmp_path, "sft", error='KeyError("ours")')
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    cause, of_launcher = last_lines(said, 2)
    assert cause == "[rank1]: KeyError: 'ours'"
    assert of_launcher == "process 1 of 2 ended with exit code 1, its message stands above"
    assert said.count("Traceback") == 1


def test_a_process_that_is_killed_ends_the_others_with_a_line(parents, tmp_path):
    process = started(parents, tmp_path, "reward")
    log, limit = tmp_path / "reward" / "metrics.jsonl", time.monotonic() + 90
    while not log.is_file() or log.read_text().count("\n") < 2:
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.02)
    children = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    children["1"].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    (line,) = last_lines(said, 1)
    assert line.startswith("process 1 of 2 was killed by SIGKILL, and the others were ended; if n")
    assert not any(child.is_running() for child in children.values())
    assert "Traceback" not in said
