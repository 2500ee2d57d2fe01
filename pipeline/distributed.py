"""Processes that work together: the only module that knows how Accelerate connects them."""

import atexit
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.streams import short_stream

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

CUBLAS_WORKSPACE = ":4096:8"
"""Workspaces with which cuBLAS is deterministic (CUDA toolkit, cuBLAS, results reproducibility)."""

USE_CPU = "ACCELERATE_USE_CPU"
"""Variable by which accelerate's launcher says that processes compute on processors."""

PRECISION = "ACCELERATE_MIXED_PRECISION"
"""Variable from which Accelerate and Trainer take a precision where they are told none."""

SHARDING = {"fsdp2": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
"""Variables by which accelerate's launcher says how models are divided over the processes."""

ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
"""Variable by which it says what DeepSpeed divides."""

KEPT_WHOLE = ("0", "1")
"""Stages of ZeRO that divide no gradients (Rajbhandari et al. 2020)."""

PATIENCE = timedelta(hours=1)
"""How long processes wait for what the main one does alone: to merge an adapter of 70B into its
base, save and digest that takes longer than NCCL's own 10 minutes. Where one ends, none waits so
long."""

ON_BOTH = "cuda:nccl,cpu:gloo"
"""What connects processes that exchange tensors of GPUs and of processors."""

OFFLOADS = {
    "FSDP_OFFLOAD_PARAMS": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
}
"""Variables by which it says that the processor's memory keeps what a GPU does not need now."""

NOT_FLATTENED = "muon needs whole matrices, and DeepSpeed lays them end to end"
"""Why one optimizer does not go with models that DeepSpeed divides."""

PLACE = {"RANK": "0", "WORLD_SIZE": "1"}
"""Variables that say which of how many processes this is, and what they say where they are not."""

BY_US = "Unset RANK and WORLD_SIZE, and start several processes with: make <stage> NPROC=2"
"""What mends an environment that speaks of processes which this project did not start."""

_together = [0.0]
"""Seconds that this process has been in collectives."""

_ends_with: list[int] = []
"""Exit code of a process that is to end without Python's teardown, once it is known."""


def rank() -> int:
    """Returns this process's number among those launched, from 0."""
    return _said("RANK")


def world_size() -> int:
    """Returns the number of processes that were launched together."""
    return _said("WORLD_SIZE")


def _said(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value if value.isdecimal() else PLACE[name])


def check_environment() -> None:
    """Checks what the environment says of this process's place, if anything.

    Raises:
        UserError: there is no such place; a cluster's pod may have set it, for other programs.
    """
    number, total = (os.environ.get(name, said) for name, said in PLACE.items())
    if not (number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise UserError(f"the environment says RANK {number} of WORLD_SIZE {total}. {BY_US}")


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


def on_gpu() -> bool:
    """Returns whether models compute on a GPU: one is here, and the launch asks for no other."""
    import torch

    processors = os.environ.get(USE_CPU, "").lower() in ("1", "true")
    return torch.cuda.is_available() and not processors


def setup(config: StageConfig, *, divides: str = "nobody", offloads: bool = False) -> "Accelerator":
    """Returns the Accelerator of a connected process, with threads and global seeds set.

    Args:
        config: of the stage.
        divides: who divides its models where the processes were launched to: accelerate, stage
            (which may as well keep them whole; Accelerate connects the processes alone), or nobody.
        offloads: whether divided weights stay in the processor's memory, which NCCL does not reach.

    Raises:
        UserError: the processes asked for and those connected are not the same number, or the
            stage was launched to divide models and cannot.
    """
    _refuse_lonely(config, world_size())
    if divides == "nobody":
        _refuse_division()
    if divides == "accelerate":
        _refuse_flattened(config)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    torch.set_num_threads(num_threads(config))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    os.environ[PRECISION] = "no"  # it is the stage's own setting, whatever a YAML says
    has_gpu = on_gpu()
    backend = {"backend": ON_BOTH} if offloads and has_gpu else {}
    groups = InitProcessGroupKwargs(timeout=PATIENCE, **backend)
    with _undivided() if divides == "stage" else contextlib.nullcontext():
        accelerator = Accelerator(cpu=not has_gpu, kwargs_handlers=[groups])
    _refuse_lonely(config, accelerator.num_processes)
    set_seed(short_stream(config.seed, "stage"))
    return accelerator


def by_deepspeed() -> bool:
    """Returns whether the processes were launched to divide models by DeepSpeed."""
    return os.environ.get(SHARDING["deepspeed"]) == "true"


def to_be_divided() -> bool:
    """Returns whether the processes were launched to divide models."""
    return any(os.environ.get(variable) == "true" for variable in SHARDING.values())


def _refuse_division() -> None:
    if to_be_divided():
        raise UserError(
            "this stage keeps whole models on every process, it cannot divide them as it is set. "
            "Use configs/accelerate/ddp.yaml"
        )


@contextlib.contextmanager
def _undivided() -> Iterator[None]:
    """Hides from Accelerate that models are to be divided: it would want to do so itself."""
    names = [name for name in SHARDING.values() if name in os.environ]
    said = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(said)


def _refuse_flattened(config: StageConfig) -> None:
    """Raises UserError where DeepSpeed would lay matrices end to end that must stay matrices."""
    if by_deepspeed() and getattr(getattr(config, "training", None), "optimizer", "") == "muon":
        raise UserError(
            f"training.optimizer: {NOT_FLATTENED}. Set it to adamw, or use "
            "configs/accelerate/fsdp2.yaml or ddp.yaml"
        )


def sharding_of(wanted: str) -> str:
    """Returns none, fsdp2 or fsdp2_offload: as wanted, or for auto what Accelerate's YAML says.

    DeepSpeed's ZeRO 2 and 3 are fsdp2 here, which divides weights, gradients and moments as ZeRO 3
    does. Where ZeRO's stage stands in a file of DeepSpeed's own, it counts as 3.
    """
    if wanted != "auto":
        return wanted
    whole = by_deepspeed() and os.environ.get(ZERO_STAGE) in KEPT_WHOLE
    if world_size() == 1 or whole or not to_be_divided():
        return "none"
    offloads = any(os.environ.get(name) == value for name, value in OFFLOADS.items())
    return "fsdp2_offload" if offloads else "fsdp2"


def only_main(config: StageConfig) -> bool:
    """Returns whether this process does the work of a stage that has nothing to divide.

    Raises:
        UserError: the processes asked for and those launched are not the same number.
    """
    _refuse_lonely(config, world_size())
    return is_main()


def _refuse_lonely(config: StageConfig, connected: int) -> None:
    if connected != config.num_processes:
        mend = f"Run: make <stage> NPROC={config.num_processes}"
        if connected > config.num_processes:  # by another launcher, or a pod's variable
            mend = f"WORLD_SIZE in the environment says so. {BY_US}"
        raise UserError(
            f"num_processes={config.num_processes} asked for, but {connected} connected. {mend}"
        )


def _connected() -> bool:
    if world_size() == 1:
        return False
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Counts what is done inside as time in a collective: waiting for the others, and sending."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _together[0] += time.perf_counter() - start


def seconds_together() -> float:
    """Returns the seconds that this process has been in collectives since it began.

    Those that torch makes by itself to gather divided weights are not among them.
    """
    return _together[0]


def barrier() -> None:
    """Waits until every process is here; does nothing when there is only one."""
    if _connected():
        import torch.distributed

        with together():
            torch.distributed.barrier()


def leave(code: int) -> None:
    """Leaves the others where all have done what they do together, before this process ends.

    Args:
        code: exit code of this process from now on.
    """
    end_with(code)
    if _connected():
        import torch.distributed

        torch.distributed.destroy_process_group()


def end_with(code: int) -> None:
    """Lets a process that is connected to others end without Python's own teardown.

    It ends once all that is registered for the end has run. In the teardown, a thread of torch's
    gloo that is about to free a tensor waits for the interpreter, which ends the thread instead,
    and with it the process (SIGABRT), whatever it has done.

    Args:
        code: exit code of this process from now on.
    """
    if _connected():
        _ends_with.append(code)


def _end_at_once() -> None:
    if _ends_with:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_ends_with[0])


atexit.register(_end_at_once)  # before any library registers something, and so after all of it


def gather_objects(value: Any) -> list[Any]:
    """Returns every process's value, in the order of ranks."""
    if not _connected():
        return [value]
    import torch.distributed

    values: list[Any] = [None] * world_size()
    with together():
        torch.distributed.all_gather_object(values, value)
    return values


def even_share(rows: Sequence[T]) -> list[T]:
    """Returns every so-many-th row, this process's share, as many as any process has.

    Where they come out short the first row of all stands in: processes that hold one model together
    must call it equally often. In the order of ranks, shares interleave to the rows, and what stood
    in comes last.
    """
    mine = list(rows[rank() :: world_size()])
    missing = -(-len(rows) // world_size()) - len(mine)
    return [*mine, *list(rows[:1]) * missing]


def in_step(work: Sequence[T]) -> list[T]:
    """Returns pieces of work, the first of them again until every process has as many.

    Every process must call it, with one piece at least.
    """
    most = max(gather_objects(len(work)))
    return [*work, *[work[0]] * (most - len(work))]


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
