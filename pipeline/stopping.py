"""When a stage saves and when it stops: by steps, by minutes, on a signal, before a time limit."""

import contextlib
import ctypes
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from pipeline.distributed import gather_objects, is_main
from pipeline.saving import Saving

STOPPED = 75
"""Exit code of a stage that was asked to stop: the same command goes on (EX_TEMPFAIL)."""
STDERR = 2
LAUNCHER = "PIPELINE_LAUNCHER"
"""Variable that names the launcher to the processes it starts, by its number."""
PR_SET_PDEATHSIG = 1
"""Linux's prctl: the signal a process gets when the one that started it dies."""


class Stopped(Exception):  # noqa: N818 - an outcome, not an error
    """The stage ends before its work is done, because it was asked to."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came where there is nothing to save."""


def end_with_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher dies, even by a signal that it cannot hear.

    Raises:
        Terminated: it is dead already.
    """
    launcher = os.environ.pop(LAUNCHER, "")
    if launcher and platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != launcher:
            raise Terminated


class Due(NamedTuple):
    """What is to be done after a step; the same on every process."""

    save: bool
    stop: bool


class Pace:
    """Watches the clock and the signals while a stage takes its steps.

    SIGTERM, SIGINT and SIGHUP only ask: the step ends, the stage saves and stops. A second SIGINT,
    or the end of the grace, stops at once; what was saved before stays.

    Attributes:
        asked_by: what asked the stage to stop; empty when nothing has.
        longest: most seconds between two places to stop at.
    """

    def __init__(self, saving: Saving, *, stage: str) -> None:
        self.saving, self.stage = saving, stage
        self.asked_by = ""
        self.longest = 0.0
        self.saved_at = self.asked_at = time.monotonic()

    def after(self, step: int) -> Due:
        """Returns what is due after a step: on every process what any of them was asked.

        Args:
            step: steps done.
        """
        stop, now = self.stops(), time.monotonic()
        waited = 0 < self.saving.minutes * 60 <= now - self.saved_at
        regular = self.saving.every > 0 and step % self.saving.every == 0
        save = stop or regular or gather_objects(waited)[0]
        self.saved_at = now if save else self.saved_at
        return Due(save=save, stop=stop)

    def stops(self) -> bool:
        """Returns whether the stage is to stop here, between two steps.

        On every process the same: what any of them was asked.
        """
        now = time.monotonic()
        self.longest, self.asked_at = max(self.longest, now - self.asked_at), now
        left = self.saving.deadline - time.time()
        if self.saving.deadline and left < self.longest + self.saving.grace_seconds:
            self.asked_by = self.asked_by or "the deadline is near"
        return self.was_asked()

    def was_asked(self) -> bool:
        """Returns whether any process was asked to stop, on every process the same.

        What was heard when each said so decides: a signal that comes while they speak is for the
        next time, or the process that it came to would stop while the others go on.
        """
        heard = next(filter(None, gather_objects(self.asked_by)), "")
        if heard and not self.asked_by:
            self.asked_by = heard
        return bool(heard)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Notes who asked and starts the grace; on Ctrl-C again raises KeyboardInterrupt."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self.asked_by:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked_by = name
        signal.setitimer(signal.ITIMER_REAL, self.saving.grace_seconds)
        if is_main():  # not through logging, which the signal may have come in the middle of
            line = f"{self.stage}: {name}: ends this step, saves and stops; Ctrl-C: at once\n"
            os.write(STDERR, line.encode())

    def on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        """Raises Stopped: the grace is over."""
        raise Stopped(
            f"{self.asked_by}: the step was not done after {self.saving.grace_seconds:g} s "
            "(saving.grace_seconds); the same command goes on from the last resume point"
        )


@contextlib.contextmanager
def keep_pace(saving: Saving, *, stage: str) -> Iterator[Pace]:
    """Yields what watches clock and signals while the stage takes its steps."""
    pace = Pace(saving, stage=stage)
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    heard = [number for number in asking if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {signal.SIGALRM: pace.on_alarm} | dict.fromkeys(heard, pace.on_signal)
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # signals are the main thread's
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield pace
    finally:
        if before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
