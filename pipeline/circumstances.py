"""When, where and with what a stage ran: the part of a manifest that no digest covers."""

import datetime
import importlib.metadata
import platform
import resource
import shutil
import subprocess
import sys
import time
from typing import Any

from pipeline.config import StageConfig

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")


def peak_memory_gib() -> float:
    """Returns the largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Usage:
    """What this process takes of the machine: memory now, and processor time since the last look.

    The same figures for every tracker, and on every machine without a further library.
    """

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def since_last(self) -> dict[str, float]:
        """Returns memory in GiB, of a GPU too, and the cores kept busy since the last call."""
        import psutil

        cpu, wall = time.process_time(), time.monotonic()
        busy = (cpu - self._cpu) / max(wall - self._wall, 1e-9)
        self._cpu, self._wall = cpu, wall
        memory = psutil.Process().memory_info().rss / 2**30
        told = {"system/memory_gib": round(memory, 3), "system/busy_cores": round(busy, 2)}
        return told | _gpu_memory()


def _gpu_memory() -> dict[str, float]:
    """Returns the most that torch has had of this process's GPU, in GiB; nothing without one."""
    if "torch" not in sys.modules:  # a stage that trains has it
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"system/peak_gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}


def circumstances(*, seconds: float, config: StageConfig) -> dict[str, Any]:
    """Returns time, host, commit, versions, processes, wall seconds and memory, as plain JSON."""
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "num_processes": config.num_processes,
        "wall_seconds": round(seconds, 2),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "overrides": list(config.overrides),
    }


def _git_commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    words = [git, "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
