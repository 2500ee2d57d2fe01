"""Starts one program as several connected processes of this machine's processors.

    python -m pipeline.launch 2 stages.ppo --recipe=cpu --num_processes=2

torch's elastic launcher does the work, as under torchrun. torchrun's own command line is left out:
it takes words of the program for its own (`--run`), and buries the one line in which a stage says
what is wrong below tracebacks about a child's exit code.
"""

import logging
import os
import sys
import uuid
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the process that failed first, 0 when none did.

    Args:
        argv: number of processes, module, and the module's own words.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a stage sets its own number of threads
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    processes, *program = argv
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
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
