"""Starts one program as several connected processes of this machine's processors.

    python -m pipeline.launch 2 stages.ppo --recipe=cpu --num_processes=2

torch's elastic launcher does the work, as under torchrun. torchrun's own command line is left out:
it takes words of the program for its own (`--run`), and buries the one line in which a stage says
what is wrong below tracebacks about a child's exit code. Its handling of signals is left out too:
it ends children after 30 s and forgets how they ended, where a stage that saves may take longer and
says by its exit code that it did.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil

PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""What the processes get of the signals that come here."""
SHUTDOWN_SECONDS = 60
"""How long the other processes may take to end after the first has ended with a failure."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the process that failed first, 0 when none did.

    Args:
        argv: number of processes, module, and the module's own words.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a stage sets its own number of threads
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _pass_on)
    processes, *program = argv
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
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
