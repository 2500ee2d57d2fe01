"""The machine that a recipe is planned for: its devices, how models are divided, how fast it is.

What is said here of GPUs is their makers' data; none of it was measured by this project.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config import require
from pipeline.distributed import num_cores
from pipeline.errors import told
from pipeline.plain_settings import check_yaml

GB = 10**9
UTILISATION = 0.4
"""Share of a GPU's peak that large products reach in training, elementwise work aside."""
COPIED = 2**20
"""Numbers of a tensor by whose copy a processor's bandwidth is measured: about as many as a pass's
tensors hold, which stay in its caches."""
GPU_CONTEXT = int(0.8 * GB)
"""What CUDA's context, its libraries and NCCL's buffers take of a GPU."""
GPU_SLACK = 0.05
"""What torch's allocator holds beyond live tensors, as a share of them."""
CPU_SLACK = 0.05
"""What the C library's allocator keeps of what was freed, as a share of live tensors."""
LAUNCH_SECONDS = 8e-6
"""One operation's call and launch from Python."""
SHORTEST = 1e-6
"""Seconds that a clock can tell from none."""
SMALLEST = 10**6
"""Bytes of a device's memory below which a unit was forgotten."""
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a device computes.

    Attributes:
        fp32_flops: floating-point operations a second in products of float32.
        bf16_flops: the same in bfloat16.
        bandwidth: bytes a second between memory and processor.
        call_seconds: what calling an operation takes.
    """

    fp32_flops: float
    bf16_flops: float
    bandwidth: float
    call_seconds: float = LAUNCH_SECONDS

    def times(self, share: float) -> "Rates":
        """Returns the rates of a share of the threads."""
        return replace(
            self,
            fp32_flops=share * self.fp32_flops,
            bf16_flops=share * self.bf16_flops,
            bandwidth=share * self.bandwidth,
        )


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A kind of GPU: its memory in bytes, and its maker's peaks of dense products per second."""

    memory: int
    fp32: float
    bf16: float
    bandwidth: float

    @property
    def rates(self) -> Rates:
        """What of the peaks is reached."""
        return Rates(
            fp32_flops=UTILISATION * self.fp32,
            bf16_flops=UTILISATION * self.bf16,
            bandwidth=2 * UTILISATION * self.bandwidth,
        )


GPUS = {
    "a100": GPU(memory=80 * GB, fp32=19.5e12, bf16=312e12, bandwidth=2.0e12),
    "a100-40gb": GPU(memory=40 * GB, fp32=19.5e12, bf16=312e12, bandwidth=1.55e12),
    "h100": GPU(memory=80 * GB, fp32=67e12, bf16=989e12, bandwidth=3.35e12),
    "rtx4090": GPU(memory=24 * GB, fp32=82e12, bf16=165e12, bandwidth=1.0e12),
    "rtx3090": GPU(memory=24 * GB, fp32=35e12, bf16=71e12, bandwidth=0.94e12),
}
"""Makers' data sheets. float32 is what torch multiplies it in unless told otherwise: no TF32."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What of a model each process holds a share of, and what stays in the host's memory."""

    kind: str = "none"
    """none, fsdp, zero2 or zero3, as accelerate's YAML says."""
    offload_weights: bool = False
    offload_optimizer: bool = False

    @property
    def divides_weights(self) -> bool:
        """Whether weights are divided."""
        return self.kind in ("fsdp", "zero3")

    @property
    def divides_state(self) -> bool:
        """Whether gradients and optimizer state are divided."""
        return self.kind != "none"

    @property
    def offloads(self) -> bool:
        """Whether the host's memory keeps some of it."""
        return self.offload_weights or self.offload_optimizer


WHOLE = Sharding()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a recipe is to run.

    Attributes:
        name: in words.
        processes: on all machines; on GPUs one each.
        memory: bytes of one device; of a processor, what all its processes share.
        rates: of one device.
        is_gpu: whether devices are GPUs.
        is_here: whether it is this machine.
        sharding: of the models.
        threads: of a processor that compute for a process, at most; the rates are of so many.
    """

    name: str
    processes: int
    memory: int
    rates: Rates
    is_gpu: bool
    is_here: bool = False
    sharding: Sharding = field(default_factory=Sharding)
    threads: int = 1

    def computing(self, threads: int) -> "Machine":
        """Returns the machine as a stage uses it that is told a number of threads; 0: all."""
        if self.is_gpu or not 0 < threads < self.threads:
            return self
        return replace(self, threads=threads, rates=self.rates.times(threads / self.threads))

    @property
    def room(self) -> float:
        """Bytes that one process may take."""
        return self.memory / (1 if self.is_gpu else self.processes)


def size_of(words: str) -> int:
    """Returns the bytes that words like 80GB or 40GiB say.

    Raises:
        UserError: they say none.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", words.strip())
    unit = found and SIZES.get(found[2].upper())
    require(
        bool(unit) and found is not None and found[1].count(".") <= 1 and found[1] != ".",
        f"--device_memory: a size as in 80GB, got {words!r}",
    )
    assert found is not None
    size = int(float(found[1]) * SIZES[found[2].upper()])
    require(size >= SMALLEST, f"--device_memory: a size as in 80GB, got {words!r}: {size} bytes")
    return size


def read_accelerate(path: Path) -> tuple[int, bool, Sharding]:
    """Returns processes, whether they are on GPUs, and the sharding that accelerate's YAML says.

    Raises:
        UserError: it cannot be read.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    check_yaml(path, may_be_empty=False)
    with told(f"{path}: accelerate cannot read it"):
        config = load_config_from_file(str(path))
        kind = str(getattr(config.distributed_type, "value", config.distributed_type))
        processes, on_processor = int(config.num_processes), bool(config.use_cpu)
        fsdp = dict(getattr(config, "fsdp_config", None) or {})
        deepspeed = dict(getattr(config, "deepspeed_config", None) or {})
    return processes, not on_processor, _sharding(kind, fsdp=fsdp, deepspeed=deepspeed)


def _sharding(kind: str, *, fsdp: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> Sharding:
    if kind == "FSDP":
        offload = bool(fsdp.get("fsdp_offload_params"))
        return Sharding(kind="fsdp", offload_weights=offload, offload_optimizer=offload)
    stage = int(deepspeed.get("zero_stage", 0)) if kind == "DEEPSPEED" else 0
    if stage not in (2, 3):
        return Sharding()
    return Sharding(
        kind=f"zero{stage}",
        offload_weights=deepspeed.get("offload_param_device") == "cpu",
        offload_optimizer=deepspeed.get("offload_optimizer_device") == "cpu",
    )


def gpus(kind: str, *, processes: int, memory: int, sharding: Sharding) -> Machine:
    """Returns so many GPUs.

    Args:
        kind: a name in `GPUS`; empty for the first, or for that with the memory.
        processes: one a GPU.
        memory: bytes of one; 0 for the kind's own.
        sharding: of the models.

    Raises:
        UserError: no such kind.
    """
    require(
        not kind or kind in GPUS,
        f"--device: must be one of {', '.join(GPUS)}, got {kind!r}; or say --device_memory",
    )
    chosen = GPUS[kind or next(iter(GPUS))]
    room = memory or chosen.memory
    name = f"GPUs of {room / GB:.0f} GB, as fast as {kind or next(iter(GPUS))}"
    return Machine(
        name=name,
        processes=processes,
        memory=room,
        rates=chosen.rates,
        is_gpu=True,
        sharding=sharding,
    )


def this_machine(processes: int, *, on_gpus: bool = True, sharding: Sharding = WHOLE) -> Machine:
    """Returns this machine: its GPUs where it has some and they are to compute, else its processor.

    A processor's rates are measured now, with one process's share of the threads; a GPU counts as
    the first of `GPUS`, with its own memory, and all as the smallest.
    """
    import psutil
    import torch

    if on_gpus and has_gpus():
        memory = min(
            torch.cuda.get_device_properties(number).total_memory
            for number in range(torch.cuda.device_count())
        )
        found = gpus("", processes=processes, memory=memory, sharding=sharding)
        return replace(found, is_here=True)
    threads = max(1, num_cores() // processes)
    return Machine(
        name=f"this machine's processor, {num_cores()} cores",
        processes=processes,
        memory=psutil.virtual_memory().total,
        rates=measured_rates(threads),
        threads=threads,
        is_gpu=False,
        is_here=True,
        sharding=sharding,
    )


def has_gpus() -> bool:
    """Returns whether this machine has GPUs."""
    import torch

    return torch.cuda.is_available()


def measured_rates(threads: int) -> Rates:
    """Returns what so many threads reach here: one thread's small products and copies, times them.

    What several threads do that wait for one another would count as work.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fp32, bf16 = (_product_rate(dtype) for dtype in (torch.float32, torch.bfloat16))
        source = torch.ones(COPIED)
        target = torch.empty_like(source)
        seconds = _fastest(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    moved = 2 * COPIED * source.element_size()
    return Rates(fp32_flops=fp32, bf16_flops=bf16, bandwidth=moved / seconds).times(float(threads))


def _product_rate(dtype: Any) -> float:
    import torch

    left, right = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
    return 2 * 512**3 / _fastest(lambda: left @ right)


def _fastest(action: Callable[[], Any]) -> float:
    """Returns the thread's own seconds of the fastest of ten calls.

    Other work on the machine is no part of them.
    """
    found = []
    for _ in range(10):
        start = time.thread_time()
        action()
        found.append(time.thread_time() - start)
    return max(min(found), SHORTEST)
