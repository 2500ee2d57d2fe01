"""Processes that work together: the only module that knows how Accelerate connects them."""

import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.streams import short_stream

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

CUBLAS_WORKSPACE = ":4096:8"
"""Workspaces with which cuBLAS is deterministic (CUDA toolkit, cuBLAS, results reproducibility)."""

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Variables by which accelerate's launcher says that models are divided over the processes."""


def rank() -> int:
    """Returns this process's number among those launched, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Returns whether this process writes the logs and the artifact."""
    return rank() == 0


def num_threads(config: StageConfig) -> int:
    """Returns the threads of one process: as configured, or the cores divided fairly."""
    return config.threads or max(1, num_cores() // config.num_processes)


def num_cores() -> int:
    """Returns the processor cores this process may use."""
    if platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def setup(config: StageConfig, *, shards: bool = False) -> "Accelerator":
    """Returns the Accelerator of a connected process, with threads and global seeds set.

    Args:
        config: of the stage.
        shards: whether the stage's models may be divided over the processes.

    Raises:
        UserError: the processes asked for and those connected are not the same number, or the
            stage was launched to divide models and cannot.
    """
    _refuse_lonely(config, world_size())
    if not shards and any(os.environ.get(name) == "true" for name in SHARDING):
        raise UserError(
            "this stage keeps whole models on every process, it cannot divide them yet. "
            "Use configs/accelerate/ddp.yaml"
        )
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    torch.set_num_threads(num_threads(config))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    _refuse_lonely(config, accelerator.num_processes)
    set_seed(short_stream(config.seed, "stage"))
    return accelerator


def only_main(config: StageConfig) -> bool:
    """Returns whether this process does the work of a stage that has nothing to divide.

    Raises:
        UserError: the processes asked for and those launched are not the same number.
    """
    _refuse_lonely(config, world_size())
    return is_main()


def _refuse_lonely(config: StageConfig, connected: int) -> None:
    if connected != config.num_processes:
        raise UserError(
            f"num_processes={config.num_processes} asked for, but {connected} connected. "
            f"Run: make <stage> NPROC={config.num_processes}"
        )


def _connected() -> bool:
    if world_size() == 1:
        return False
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    """Waits until every process is here; does nothing when there is only one."""
    if _connected():
        import torch.distributed

        torch.distributed.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Returns every process's value, in the order of ranks."""
    if not _connected():
        return [value]
    import torch.distributed

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], T]) -> T:
    """Acts on the main process alone; what it returns or raises is every process's, so none waits.

    Raises:
        UserError: the action did.
        UpToDate: the action did.
    """
    outcome: Any = None
    if is_main():
        try:
            outcome = action()
        except (UserError, UpToDate) as error:
            outcome = error
    outcome = gather_objects(outcome)[0]
    if isinstance(outcome, UserError | UpToDate):
        raise outcome
    return outcome
