"""Strikes a stage from inside, before the n-th change of its folder that matches a pattern.

Python imports this file at start-up wherever its folder is on PYTHONPATH, so the stage runs under
its own `make` line and knows nothing of it. Python tells an audit hook what it is about to do, so
the strike falls between two changes of the folder, every time at the same place; a delay moves it
to some time after. Every change is noted in a trace, whose last line is where the stage was.
"""  # noqa: INP001 - a package of this name would hide the file from Python

import json
import os
import re
import sys
import threading
import time
from typing import Any

CHANGES = {
    "os.mkdir": "mkdir",
    "os.remove": "remove",
    "os.rename": "rename",
    "os.rmdir": "rmdir",
    "os.truncate": "truncate",
    "shutil.rmtree": "rmtree",
}
"""Audit events that change a folder, and their names in a trace; `open` is one when it writes."""
LAST_ARGUMENT_IS_FOLDER = ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
"""Events whose last argument is the folder, already open, that the path is relative to."""
BETWEEN_SECONDS = 0.05
"""Between two signals of one strike: Python hears of signals sent at once only once."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """An audit hook that notes the changes of a folder and strikes at one of them."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.folder = order["folder"] + os.sep
        self.trace = os.open(order["trace"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.pattern = re.compile(order["pattern"]) if order["pattern"] else None
        self.left = order["count"]
        self.delay, self.number = order["delay"], order["signal"]
        self.alone, self.times = order["alone"], order["times"]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Is told of everything before it happens."""
        if event != "open" and event not in CHANGES:
            return
        if event == "open" and not _writes(*arguments[1:3]):
            return
        path = _absolute(arguments[0], _base(event, arguments))
        inside = f"{path}{os.sep}".startswith(self.folder)
        if not inside or (event == "shutil.rmtree" and not _exists(path)):
            return
        change = f"{CHANGES.get(event, 'open')} {self._name(path)}"
        if event == "os.rename":
            change += f" -> {self._name(_absolute(arguments[1], None))}"
        self._note(change)
        if self.pattern is not None and self.pattern.search(change):
            self.left -= 1
            if self.left == 0:
                self._aim()

    def _name(self, path: str) -> str:
        """The path below the watched folder; the folder itself is a dot."""
        return f"{path}{os.sep}".removeprefix(self.folder).rstrip(os.sep) or "."

    def _note(self, text: str) -> None:
        os.write(self.trace, f"{time.time():.4f} {text}\n".encode())

    def _aim(self) -> None:
        if not self.delay:
            self._strike()
            return
        timer = threading.Timer(self.delay, self._strike)
        timer.daemon = True
        timer.start()

    def _strike(self) -> None:
        """Signals this process alone, or its whole group, to which make belongs."""
        self._note("struck")
        for turn in range(self.times):
            if turn:
                time.sleep(BETWEEN_SECONDS)
            os.kill(os.getpid() if self.alone else 0, self.number)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & WRITING) if mode is None else any(letter in mode for letter in "wax+")


def _base(event: str, arguments: tuple[Any, ...]) -> Any:
    """The open folder that an event's path is relative to, or None."""
    return arguments[-1] if event in LAST_ARGUMENT_IS_FOLDER else None


def _absolute(name: Any, base: Any) -> str:
    """The absolute path of what Python was handed; none of an open file's number."""
    if isinstance(name, int):
        return ""
    name = os.fsdecode(name)
    if isinstance(base, int) and base >= 0:
        name = os.path.join(os.readlink(f"/proc/self/fd/{base}"), name)  # noqa: PTH115, PTH118
    return os.path.abspath(name)  # noqa: PTH100 - resolving would follow links


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def watch() -> None:
    """Begins to watch where this process is the stage that the order names."""
    order = json.loads(os.environ.get("CRASH_ORDER", "null"))
    if order is not None and f"stages.{order['stage']}" in sys.orig_argv:
        sys.addaudithook(Watch(order))


watch()
