"""The command line: exit codes, and one line for what a user can mend."""

import errno
import os
import signal
import time

import pytest

from pipeline.command import INTERRUPTED, TERMINATED, command
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.stopping import STOPPED, Stopped


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "cpu").mkdir(parents=True)
    (tmp_path / "configs" / "cpu" / "toy.yaml").write_text("seed: 1\n", encoding="utf-8")


def outcome(error, caplog, *words):
    def run(config: StageConfig) -> None:
        if error is not None:
            raise error

    with caplog.at_level("INFO"):
        code = command(StageConfig, run, list(words), stage="toy")
    return code, [record.getMessage() for record in caplog.records]


def test_success_is_zero(caplog):
    assert outcome(None, caplog) == (0, [])


@pytest.mark.parametrize(("error", "leaves"), [(None, 1), (RuntimeError("out of memory"), 0)])
def test_the_others_are_left_where_all_have_done_their_work(monkeypatch, caplog, error, leaves):
    """One that fails may stand in the middle of what they do together."""
    left, codes = [], []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr("pipeline.distributed.world_size", lambda: 2)
    monkeypatch.setattr("pipeline.distributed._ends_with", codes)  # not pytest's own end
    code, _ = outcome(error, caplog)
    assert (len(left), codes) == (leaves, [code])


def test_up_to_date_is_zero_and_said(caplog):
    assert outcome(UpToDate("runs/cpu/toy is up to date"), caplog) == (
        0,
        ["toy: runs/cpu/toy is up to date"],
    )


def test_a_users_mistake_is_two_and_one_line(caplog):
    code, lines = outcome(UserError("size: wrong\n  on two lines"), caplog)
    assert (code, lines) == (2, ["toy: size: wrong on two lines"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_disk_trouble_is_two_and_names_the_file(number, words, caplog):
    code, lines = outcome(OSError(number, "trouble", "runs/cpu/toy/x"), caplog)
    assert code == 2
    assert len(lines) == 1
    assert "runs/cpu/toy/x" in lines[0]
    assert words in lines[0]


def test_a_read_only_folder_is_one_line(tmp_path, caplog):
    from pipeline.checkpoint import begin

    def run(config: StageConfig) -> None:
        with begin(config, stage="toy", kind="report", parents={}):
            raise AssertionError("a file stands where the folder should be")

    (tmp_path / "runs").write_text("not a folder", encoding="utf-8")
    with caplog.at_level("INFO"):
        code = command(StageConfig, run, ["--tracking=none"], stage="toy")
    assert code == 2
    assert "runs" in caplog.records[-1].getMessage()


def test_our_own_bugs_keep_their_traceback(caplog):
    with pytest.raises(OSError, match="strange"):
        outcome(OSError(errno.EIO, "strange"), caplog)


def test_ctrl_c_is_one_line_that_says_how_to_go_on(caplog):
    code, lines = outcome(KeyboardInterrupt(), caplog)
    assert code == 130
    assert lines == ["toy: interrupted; the same command goes on from the last resume point"]
    _, lines = outcome(KeyboardInterrupt(), caplog, "--force=true")
    assert lines[-1].startswith("toy: interrupted; the same command without FORCE=1 goes on from")


def test_another_process_speaks_after_the_main_one(monkeypatch, caplog):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("pipeline.command.time.sleep", waited.append)
    code, lines = outcome(UserError("only here"), caplog)
    assert (code, lines, waited) == (2, ["toy (process 1 of 4): only here"], [3.0])


def test_a_process_that_misses_another_lets_that_one_speak(monkeypatch, caplog):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9")
    with pytest.raises(RuntimeError, match="closed by peer"):
        outcome(gone, caplog)  # of a process that has no companions
    waited = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("pipeline.command.time.sleep", waited.append)
    code, lines = outcome(gone, caplog)
    said = "toy: a process that this one waited for has ended; its message says why"
    assert (code, lines, waited) == (1, [said], [6.0])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_is_one_line(error, caplog):
    code, lines = outcome(error, caplog)
    line = f"toy: memory is full ({error}). Lower microbatch_size or the lengths"
    assert (code, lines) == (2, [line])


def test_an_operation_that_is_never_deterministic_is_one_line(caplog):
    text = "kthvalue CUDA does not have a deterministic implementation, but you set ... You can"
    code, lines = outcome(RuntimeError(text), caplog)
    assert code == 2
    assert lines[0].startswith("toy: kthvalue CUDA does not have a deterministic implementation")
    assert lines[0].endswith("Set deterministic to false")
    with pytest.raises(RuntimeError, match="shapes"):
        outcome(RuntimeError("shapes do not fit"), caplog)


def test_a_stage_that_was_asked_to_stop_says_so_with_a_code_of_its_own(caplog):
    code, lines = outcome(Stopped("SIGTERM: stopped after step 3"), caplog)
    assert (code, lines) == (STOPPED, ["toy: SIGTERM: stopped after step 3"])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)]
)
def test_a_signal_where_nothing_is_to_be_saved_ends_the_stage(number, code, caplog):
    def run(config: StageConfig) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command(StageConfig, run, [], stage="toy") == code == 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caplog.records[-1].getMessage().startswith("toy: interrupted; the same command goes on")
