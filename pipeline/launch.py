"""Starts one program as several connected processes of this machine's processors.

    python -m pipeline.launch 2 stages.ppo --recipe=cpu --num_processes=2

torch's elastic launcher does the work, as under torchrun. torchrun's own command line is left out:
it takes words of the program for its own (`--run`), and buries the one line in which a stage says
what is wrong below tracebacks about a child's exit code. The processes meet on the loopback alone:
torchrun's rendezvous listens on every address of the machine and unpickles what it is sent.
"""

import logging
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from typing import Any

LOOPBACK = "127.0.0.1"


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
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a stage sets its own number of threads
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    processes, *program = argv
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
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", *program)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
