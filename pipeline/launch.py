"""Starts one program as several connected processes, and ends them together.

    python -m pipeline.launch 2 stages.ppo --recipe=cpu
    python -m pipeline.launch --config=configs/accelerate/ddp.yaml 8 stages.ppo --recipe=cpu

The first starts processes of this machine's processors; the second what accelerate's YAML says,
with the environment that accelerate's own launcher would give them. The program is told how many
processes were launched (`--num_processes`).

The launchers of torch and accelerate are left out. Theirs listen on every address of the machine
and unpickle what they are sent, where ours meet on the loopback unless there are several machines.
They end children 30 s after a signal and forget how they ended, where a stage that saves may take
longer and says by its exit code that it did. They bury the one line in which a stage says what is
wrong below tracebacks about a child's exit code. And when a process ends that others wait for, they
leave these the time of a signal that nobody hears in the middle of a collective operation.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import UserError
from pipeline.placement import Placement, as_configured, on_processors
from pipeline.stopping import LAUNCHER, STOPPED

log = logging.getLogger(__name__)

CONFIG = "--config="
USAGE = "Say: python -m pipeline.launch 2 stages.ppo --recipe=cpu"
LOOPBACK = "127.0.0.1"
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""What the processes get of the signals that come here."""
USER_MISTAKE = 2
"""Exit code of what the user can mend, as stages have it."""
TOLD = (USER_MISTAKE, STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes after which the process has said why in a line of its own."""
AGREE_SECONDS = 3.0
"""How long the others may take to end by themselves, for the same reason, once one has failed."""
STOP_SECONDS = 60.0
"""The same, once one has stopped because it was asked to: the others may still be writing."""
LOOK_SECONDS = 0.05
STARTING_SECONDS = 10.0
"""How long a process may take to begin to hear signals. One that comes before ends Python with an
exit code of its own."""
PYTHONS_OWN = 1
"""That exit code, which says nothing of the signal."""


def loopback_store() -> Any:
    """Returns torch's TCPStore where this machine's processes reach it, and no other machine.

    By itself it would listen on every address, so it is given a socket that listens already.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.create_server((LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
        return TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening.detach(),  # closed with the store
        )


def loopback_interface() -> str:
    """Returns the name of the interface by which a machine talks to itself: lo, or lo0."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


class Family:
    """The processes that this machine started, and what they end with.

    Attributes:
        first: number of the first of them among those of all machines.
        total: processes of all machines.
        children: by their number on this machine.
        ended: exit codes by the same numbers.
        asked: signals that came here and were not yet passed on.
        passed: the last one that was passed on, 0 for none.
    """

    def __init__(self, placement: Placement) -> None:
        self.total, self.first = placement.total, placement.machine * placement.here
        self.ended: dict[int, int] = {}
        self.asked: list[int] = []
        self.passed, self.began = 0, time.monotonic()
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, program: Sequence[str], placement: Placement, *, port: int) -> None:
        """Starts the processes; from now on signals that come here are for all of them."""
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)
        command = [sys.executable, "-u", "-m", *program, f"--num_processes={placement.total}"]
        ours = {LAUNCHER: str(os.getpid())}
        for local in range(placement.here):
            child = subprocess.Popen(
                command,
                env={**os.environ, **placement.variables(local, port=port), **ours},
                start_new_session=True,  # Ctrl-C of a terminal comes once, through this process
            )
            self.children.append(child)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Notes a signal, which the processes get once all of them are there."""
        self.asked.append(number)

    def _pass_on(self) -> None:
        """Gives every process the signals that came; how they end is theirs to say."""
        while self.asked:
            number = PASSED_ON[signal.Signals(self.asked.pop(0))]
            self.passed = number
            for child in self.children:
                child.send_signal(number)

    def wait(self) -> int:
        """Returns the exit code of the one that failed first, 0 when none did.

        The others are ended when they have not ended by themselves soon after.
        """
        while not self._failed():
            if len(self.ended) == len(self.children):
                return 0
            time.sleep(LOOK_SECONDS)
        failed_at = time.monotonic()
        while len(self.ended) < len(self.children):
            if time.monotonic() > failed_at + self._grace:
                break
            time.sleep(LOOK_SECONDS)
            self._failed()
        culprit, code = next(iter(self.ended_badly.items()))
        left = [child for child in self.children if child.poll() is None]
        for child in left:
            child.kill()
            child.wait()
        starting = failed_at < self.began + STARTING_SECONDS
        if starting and self.passed and code == PYTHONS_OWN:
            return 128 + self.passed
        self._tell(culprit, code, others=len(left))
        return code if code > 0 else 128 - code

    @property
    def _grace(self) -> float:
        """How long the others may take; none once the main process has spoken for all."""
        if STOPPED in self.ended.values():
            return STOP_SECONDS
        return 0.0 if self.first == 0 and self.ended.get(0) in TOLD else AGREE_SECONDS

    def _failed(self) -> bool:
        """Passes signals on and looks at who has ended; returns whether one has failed."""
        self._pass_on()
        for number, child in enumerate(self.children):
            code = child.poll()
            if code is not None:
                self.ended.setdefault(number, code)
        return bool(self.ended_badly)

    @property
    def ended_badly(self) -> dict[int, int]:
        """Exit codes of the processes that failed: those that were killed, then the others."""
        bad = [(number, code) for number, code in self.ended.items() if code]
        return dict(sorted(bad, key=lambda each: each[1] > 0))

    def _tell(self, number: int, code: int, *, others: int) -> None:
        """Says which process failed, where its own words do not tell.

        One that was killed has left its progress bar without an end of line.
        """
        name = f"process {self.first + number} of {self.total}"
        if code < 0:
            what = f"{name} was killed by {signal.Signals(-code).name}"
            hint = "the same command goes on from the last resume point (without FORCE=1)"
            if -code == signal.SIGKILL:
                hint = f"if nobody did, the memory was full; {hint}"
            log.error("\n%s, and the others were ended; %s", what, hint)
        elif code not in TOLD:
            well = [str(self.first + one) for one, found in self.ended.items() if found == 0]
            others_code = f"; process {', '.join(well)} ended with exit code 0" if well else ""
            told = "%s ended with exit code %d, its message stands above%s"
            log.error(told, name, code, others_code)
        elif others and number:
            log.error("%s failed, and the others were ended", name)


@contextlib.contextmanager
def meeting(placement: Placement) -> Iterator[int]:
    """Yields the port where the processes meet, which is open here for one machine's alone."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a stage sets its own number of threads
    if placement.machines > 1 or placement.total == 1:
        yield placement.port
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    store = loopback_store()
    yield store.port
    del store


def parsed(argv: Sequence[str]) -> tuple[str, int, list[str]]:
    """Returns accelerate's YAML (empty for none), the number of processes, and the program.

    Raises:
        UserError: one of the last two is missing, or the number is none, as 0 is without a YAML.
    """
    words = list(argv)
    config = ""
    if words and words[0].startswith(CONFIG):
        config = words.pop(0).removeprefix(CONFIG)
    fewest = 0 if config else 1
    if len(words) < 2 or not words[0].isdecimal() or int(words[0]) < fewest:
        raise UserError(f"how many processes of which program? {USAGE}")
    return config, int(words[0]), words[1:]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the process that failed first, 0 when none did.

    Args:
        argv: accelerate's YAML as `--config=FILE`, if any; number of processes (with a YAML: on all
            machines, 0 for as many as it says), module, and the module's own words.
    """
    try:
        config, processes, program = parsed(argv)
        if config:
            placement = as_configured(Path(config), processes=processes)
        else:
            placement = on_processors(processes)
    except UserError as error:
        log.error("%s", error)
        return USER_MISTAKE
    with meeting(placement) as port:
        family = Family(placement)
        family.start(program, placement, port=port)
        return family.wait()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
