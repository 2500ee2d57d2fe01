"""One process at a time on a stage's folder: a lock beside it that ends with its holder."""

import errno
import fcntl
import json
import logging
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.shapes import holds, is_amount, is_text, is_whole, mapping
from pipeline.storage import make_folder

log = logging.getLogger(__name__)

HELD = (errno.EACCES, errno.EAGAIN)
"""What the system answers when another process holds the lock."""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that know no locks."""
HOLDER = ("pid", "host", "since")
CLOCK_SECONDS = 2.0
"""How far the system's word on when a process began may lie off the clock."""
LARGEST_PID = 2**31 - 1


class Lock:
    """A POSIX record lock, which the system drops when its process ends, however it ends.

    The file names the holder by process and host. It stays when the lock is given back, empty, so
    that two processes can never hold two files of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Takes the lock, over from a dead process too.

        Raises:
            UserError: another process holds it, named with its host; or no folder can be made.
        """
        make_folder(self.path.parent)
        file = self.path.open("a+", encoding="utf-8")
        file.seek(0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _named(file.read())
            file.close()
            if error.errno in HELD:
                raise UserError(
                    f"{self.path.parent} is being worked on by {holder or 'another process'}. "
                    f"Wait until it is done or stop it, then run the same command again"
                ) from error
            if error.errno in UNSUPPORTED:
                log.warning("%s: this file system has no locks; start nothing twice", self.path)
                return
            raise
        if dead := _named(file.read()):
            log.info("%s: the lock of %s, which is gone, is taken over", self.path, dead)
        self._file = file
        self._write({"pid": os.getpid(), "host": platform.node(), "since": time.time()})

    def release(self) -> None:
        """Gives the lock back; does nothing when it is not held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _write(self, holder: dict[str, object]) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Holder:
    """The process that a lock's file names."""

    pid: int
    host: str
    since: float
    """When it took the lock, in seconds since 1970."""

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.host == platform.node()

    def is_alive(self) -> bool:
        """Returns whether it is still at work; only for one of this machine.

        A process that began after the lock was taken has only inherited the number.
        """
        import psutil

        try:
            process = psutil.Process(self.pid)
            began, status = process.create_time(), process.status()
        except psutil.Error:
            return False
        return began <= self.since + CLOCK_SECONDS and status != psutil.STATUS_ZOMBIE


def holder_of(path: Path) -> Holder | None:
    """Returns who holds a lock, or held it when it died; None where nobody does."""
    try:
        if path.is_symlink():  # ours are plain files
            return None
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return Holder(**{name: named[name] for name in HOLDER}) if _is_holder(named) else None


def _is_holder(named: Any) -> bool:
    shape = mapping({"pid": holds(is_whole), "host": holds(is_text), "since": holds(is_amount)})
    return shape(named) is None and named["pid"] <= LARGEST_PID


def _named(text: str) -> str:
    """Returns a holder as `process N on host X`, or nothing when the text names none."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return ""
