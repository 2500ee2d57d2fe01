"""Figures of processes. Imports nothing but Python: the peer's environment runs it too."""

import resource
import subprocess
import sys


def peak_mb() -> float:
    """Returns the peak resident memory of this process in MB; Linux counts it in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def output_of(module: str, *words: object) -> str:
    """Returns what a module writes when a process of its own runs it."""
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
