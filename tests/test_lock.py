"""One process at a time on a stage's folder."""

import fcntl
import json
import platform
import subprocess
import sys
from errno import ENOLCK

import pytest

from pipeline.errors import UserError
from pipeline.lock import Lock

HOLDER = """
import pathlib, sys, time
from pipeline.lock import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "cpu" / ".sft.lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def lock(path):
    """A lock that is given back after the test."""
    lock = Lock(path)
    yield lock
    lock.release()


def test_a_second_process_is_refused_with_the_first_ones_pid_and_host(path, holder):
    with pytest.raises(UserError, match=f"process {holder.pid} on {platform.node()}"):
        Lock(path).acquire()
    assert holder.poll() is None


def test_the_lock_of_a_killed_process_is_taken_over_aloud(path, lock, holder, caplog):
    holder.kill()
    holder.wait()
    with caplog.at_level("INFO"):
        lock.acquire()
    assert f"process {holder.pid} on {platform.node()}, which is gone, is taken over" in caplog.text
    assert json.loads(path.read_text())["host"] == platform.node()


def test_a_lock_given_back_is_nobodys(path, lock, caplog):
    lock.release()
    lock.acquire()
    lock.release()
    assert path.read_text() == ""
    with caplog.at_level("INFO"):
        lock.acquire()
    assert not caplog.messages


def test_a_damaged_lock_file_names_nobody(path, holder):
    path.write_text('{"pid": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="is being worked on by another process"):
        Lock(path).acquire()


def test_a_file_system_without_locks_is_told(path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    Lock(path).acquire()
    assert "this file system has no locks" in caplog.text


def test_other_troubles_of_the_disk_are_raised(path, monkeypatch):
    def lockf(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="Input/output"):
        Lock(path).acquire()
