"""Starts one program as several connected processes of this machine's processors.

    python -m pipeline.launch 2 stages.ppo --recipe=cpu --num_processes=2

torch's elastic launcher does the work, as under torchrun. torchrun's own command line is left out:
it takes words of the program for its own (`--run`), and buries the one line in which a stage says
what is wrong below tracebacks about a child's exit code. The processes meet on the loopback alone:
torchrun's rendezvous listens on every address of the machine and unpickles what it is sent. And its
handling of signals is left out: it ends children after 30 s and forgets how they ended, where a
stage that saves may take longer and says by its exit code that it did.
"""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

from pipeline.distributed import num_cores

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""What the processes get of the signals that come here."""
MOST_PER_CORE = 16
"""Processes that a core is asked to share; more would only take the machine's memory."""
USER_MISTAKE = 2
"""Exit code of what the user can mend, as stages have it."""
SHUTDOWN_SECONDS = 60
"""How long the other processes may take to end after the first has ended with a failure."""


def loopback_store() -> Any:
    """Returns torch's TCPStore where this machine's processes reach it, and no other machine.

    By itself it would listen on every address, so it is given a socket that listens already. The
    launcher, told the same address, finds it there (multi_tenant) and starts none of its own.
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


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the process that failed first, 0 when none did.

    Args:
        argv: number of processes, module, and the module's own words.
    """
    processes, *program = argv
    if int(processes) > (most := MOST_PER_CORE * num_cores()):
        log.error("NPROC=%s: at most %d processes on this machine's cores", processes, most)
        return USER_MISTAKE
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a stage sets its own number of threads
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _pass_on)
    store = loopback_store()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        run_id=uuid.uuid4().hex,
        rdzv_backend="static",
        rdzv_endpoint=f"{LOOPBACK}:{store.port}",
        rdzv_configs={"rank": 0},
        max_restarts=0,
        signals_to_handle="",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", *program)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Gives a signal to every process that was started, and waits on for how they end."""
    for child in psutil.Process().children():
        child.send_signal(PASSED_ON[signal.Signals(number)])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
