"""A program is struck exactly before the change it was to be struck at."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = Path(__file__).parents[2] / "benchmarks" / "crash" / "inside"
PROGRAM = """
import os, shutil, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, lambda *_: sys.exit(76)))
(folder / "point").mkdir(parents=True)
(folder / "point" / "a").write_text("a")
(folder / "point" / "a").read_text()
os.close(os.open(folder, os.O_RDONLY))
(folder / "log").open("ab").close()
(folder.parent / "elsewhere").write_text("not watched")
os.truncate(folder / "log", 0)
shutil.rmtree(folder / "none", ignore_errors=True)
os.replace(folder / "point", folder / "step")
shutil.rmtree(folder / "step")
time.sleep(0.5)
(folder / "end").touch()
"""
CHANGES = [
    "mkdir point", "mkdir .", "mkdir point", "open point/a", "open log", "truncate log",
    "rename point -> step", "rmtree step", "remove step/a", "rmdir step", "open end",
]  # fmt: skip


@pytest.fixture
def struck(tmp_path):
    """Runs the program as a stage of its own group and returns exit code and trace."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "made_up.py").write_text(PROGRAM)

    def run(pattern: str = "", count: int = 1, stage: str = "made_up", **order: object):
        trace = tmp_path / "trace"
        order = {"delay": 0.0, "signal": signal.SIGKILL, "alone": False, "times": 1} | order
        order |= {"stage": stage, "folder": str(tmp_path / "folder"), "trace": str(trace)}
        order |= {"pattern": pattern, "count": count}
        ended = subprocess.run(
            [sys.executable, "-m", "stages.made_up", "folder"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(INSIDE), "CRASH_ORDER": json.dumps(order)},
            start_new_session=True,
        )
        lines = trace.read_text().splitlines() if trace.exists() else []
        return ended.returncode, [line.split(" ", 1)[1] for line in lines]

    return run


def test_every_change_is_noted_and_nothing_else(struck):
    assert struck() == (0, CHANGES)


@pytest.mark.parametrize(
    ("pattern", "count", "before"),
    [(".", 1, 0), (".", 5, 4), ("truncate", 1, 5), ("^rename", 1, 6), (r"^\w+ step", 2, 8)],
)
def test_the_program_is_killed_before_the_change(struck, tmp_path, pattern, count, before):
    assert struck(pattern, count) == (-signal.SIGKILL, [*CHANGES[: before + 1], "struck"])
    assert (tmp_path / "folder" / "log").exists() == (before > 4)
    assert (tmp_path / "folder" / "step" / "a").exists() == (before == 8)


def test_a_delay_moves_the_strike_behind_the_change(struck, tmp_path):
    code, trace = struck("rmdir step", delay=0.05)
    assert (code, trace[-2:]) == (-signal.SIGKILL, ["rmdir step", "struck"])
    assert not (tmp_path / "folder" / "step").exists()
    assert not (tmp_path / "folder" / "end").exists()


def test_another_signal_can_be_answered(struck):
    code, trace = struck("rmdir step", signal=signal.SIGTERM, alone=True)
    assert (code, trace[-1]) == (75, "struck")


@pytest.mark.parametrize(("delay", "times", "expected"), [(0.0, 1, 0), (0.0, 2, 76), (0.05, 2, 76)])
def test_a_signal_is_sent_as_often_as_it_should(struck, delay, times, expected):
    assert struck("rmdir step", signal=signal.SIGINT, delay=delay, times=times)[0] == expected


def test_a_change_that_never_comes_strikes_nobody(struck):
    assert struck("nothing like it") == (0, CHANGES)


def test_another_program_is_left_alone(struck):
    assert struck(".", stage="other") == (0, [])
