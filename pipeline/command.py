"""The command line of a stage: load the configuration, run, tell a user's mistake in one line."""

import argparse
import contextlib
import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn, TypeVar

from pipeline.config import StageConfig, load
from pipeline.distributed import check_environment, end_with, is_main, leave, rank, world_size
from pipeline.errors import UpToDate, UserError, first_line
from pipeline.manifest import remember_recipe
from pipeline.pretrained import permit
from pipeline.stopping import STOPPED, Stopped, Terminated, end_with_launcher
from pipeline.terminal import start_logging

C = TypeVar("C", bound=StageConfig)

USER_MISTAKE = 2
"""Exit code of everything the user can mend."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C where nothing was to be saved, or after a second one."""

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM where nothing was to be saved."""

FAILED = 1
"""Exit code of a process that failed through no mistake of the user's."""

GRACE_SECONDS = 3.0
"""How long another process waits before it says what the main one has probably said; twice that
where a process only misses another, which has more to say and after which the launcher ends all."""

TOLD = {UpToDate: 0, UserError: USER_MISTAKE, Stopped: STOPPED}
"""Exit codes of what comes with its own words."""

NO_SUCH_ALGORITHM = "does not have a deterministic implementation"
"""What torch says where `deterministic` asks for what it does not have."""

NO_MEMORY = ("out of memory", "can't allocate memory")
"""What torch says where memory is full, on GPUs and on processors."""

ALONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("ncclRemoteError", "remote process exited"),
)
"""What gloo, torch's store and NCCL say when a process that others wait for has gone."""

DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder with RUN=",
    errno.EEXIST: "a file stands where a folder is needed: remove it or choose another RUN=",
    errno.ENOTDIR: "a file stands where a folder is needed: remove it or choose another RUN=",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter RUN=",
    errno.EISDIR: "a folder stands where a file is needed: remove it or choose another RUN=",
    errno.ELOOP: "its links lead in a circle: choose another folder with RUN=",
    errno.EPERM: "not permitted: choose another folder with RUN=",
    errno.EACCES: "permission denied: make it writable or choose another folder with RUN=",
}


class Parser(argparse.ArgumentParser):
    """Reads the words of a command that has no configuration file; a wrong one is a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with what is wrong, and where the right words are listed."""
        raise UserError(f"{message}. Try: {self.prog} --help")


def command(
    config_class: type[C],
    run: Callable[[C], None],
    argv: Sequence[str] | None = None,
    *,
    stage: str,
) -> int:
    """Returns the exit code of a stage's command line.

    0: done. 2: a mistake the user can mend. 75: asked to stop, and saved; the same command goes on.
    130 and 143: Ctrl-C or SIGTERM where nothing was to be saved.
    """
    start_logging(logging.INFO if is_main() else logging.WARNING)  # others would say it again
    for noisy in ("httpx", "filelock", "datasets", "transformers", "absl", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of a file's milliseconds
    with _terminable():
        return _outcome(config_class, run, argv, stage=stage)


def _outcome(
    config_class: type[C], run: Callable[[C], None], argv: Sequence[str] | None, *, stage: str
) -> int:
    log, forced = logging.getLogger(f"stages.{stage}"), False
    try:
        end_with_launcher()
        check_environment()
        config = load(config_class, argv, stage=stage)
        forced = config.force
        remember_recipe(config.run_dir, config.recipe)
        trusted = config.trust_remote_code
        permit([*trusted, *(str(config.folder(name)) for name in trusted)])
        run(config)
        leave(0)
    except (
        *(UpToDate, UserError, Stopped, KeyboardInterrupt),
        *(OSError, RuntimeError, MemoryError),
    ) as error:
        code, line = _ending(error)
        if not line:
            raise
        if forced:  # begins anew, as often as it is said
            line = line.replace("same command goes on", "same command without FORCE=1 goes on")
        _say(log.error if code else log.info, stage, line, last=code == FAILED)
        end_with(code)
        return code
    return 0


def _ending(error: BaseException) -> tuple[int, str]:
    """Returns exit code and line of an error that a user understands; no line for our own bugs."""
    match error:
        case UpToDate() | UserError() | Stopped():
            return TOLD[type(error)], str(error)
        case OSError() if error.errno in DISK_TROUBLE:
            return USER_MISTAKE, f"{error.filename or 'disk'}: {DISK_TROUBLE[error.errno]}"
        case RuntimeError() | MemoryError():
            return _ending_of_work(error)
        case KeyboardInterrupt():
            code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
            return code, "interrupted; the same command goes on from the last resume point"
    return 1, ""


def _ending_of_work(error: RuntimeError | MemoryError) -> tuple[int, str]:
    """Returns exit code and line of what torch raises that is nobody's bug."""
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY):
        line = f"memory is full ({first_line(error)}). Lower microbatch_size or the lengths"
        return USER_MISTAKE, line
    if NO_SUCH_ALGORITHM in said:
        return USER_MISTAKE, f"{said.split('.', maxsplit=1)[0]}. Set deterministic to false"
    if world_size() > 1 and any(words in said for words in ALONE):
        return FAILED, "a process that this one waited for has ended; its message says why"
    return FAILED, ""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM an interruption that Python code can end tidily; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _say(write: Callable[[str], None], stage: str, line: str, *, last: bool) -> None:
    """Writes a line once: the main process at once, another only when it is alone with its news.

    When all processes stop for the same reason, the launcher ends the others within the grace.

    Args:
        write: of the log.
        stage: whose line it is.
        line: what there is to say.
        last: whether another process has more to say; then the main one waits too.
    """
    if last or not is_main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS * (2 if last else 1))
    name = stage if is_main() else f"{stage} (process {rank()} of {world_size()})"
    write(f"{name}: {line}")
