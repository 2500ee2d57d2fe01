"""The command line of a stage: load the configuration, run, tell a user's mistake in one line."""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.config import StageConfig, load
from pipeline.distributed import is_main
from pipeline.errors import UpToDate, UserError

C = TypeVar("C", bound=StageConfig)

USER_MISTAKE = 2
"""Exit code of everything the user can mend."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

GRACE_SECONDS = 5.0
"""How long another process waits before it says what the main one has probably said."""

DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder with RUN=",
    errno.ENOTDIR: "a file stands where a folder is needed: remove it or choose another RUN=",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter RUN=",
    errno.EISDIR: "a folder stands where a file is needed: remove it or choose another RUN=",
    errno.ELOOP: "its links lead in a circle: choose another folder with RUN=",
    errno.EPERM: "not permitted: choose another folder with RUN=",
    errno.EACCES: "permission denied: make it writable or choose another folder with RUN=",
}


def command(
    config_class: type[C],
    run: Callable[[C], None],
    argv: Sequence[str] | None = None,
    *,
    stage: str,
) -> int:
    """Returns the exit code of a stage's command line: 0, or 2 for a mistake the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "filelock", "datasets", "transformers", "absl", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of a file's milliseconds
    log = logging.getLogger(f"stages.{stage}")
    try:
        run(load(config_class, argv, stage=stage))
    except UpToDate as outcome:
        _say(log.info, f"{stage}: {outcome}")
    except UserError as error:
        _say(log.error, f"{stage}: {error}")
        return USER_MISTAKE
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        _say(log.error, f"{stage}: {error.filename or 'disk'}: {DISK_TROUBLE[error.errno]}")
        return USER_MISTAKE
    except KeyboardInterrupt:
        _say(
            log.error, f"{stage}: interrupted; the same command goes on from the last resume point"
        )
        return INTERRUPTED
    return 0


def _say(write: Callable[[str], None], line: str) -> None:
    """Writes a line once: the main process at once, another only when it is alone with its news.

    When all processes stop for the same reason, the launcher ends the others within the grace.
    """
    if not is_main():
        time.sleep(GRACE_SECONDS)
    write(line)
