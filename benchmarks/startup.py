"""Start-up of every stage: `--help`, and what its libraries cost before the first step.

Every figure is a process of its own; the median of some, in turns. Seconds are the processor's own
(a shared machine distorts them little) beside those on the wall.

Run     python -m benchmarks.startup [--runs=5]        prints the tables of docs/costs.md
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

STAGES = (
    "data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report",
)  # fmt: skip
LIBRARIES = {
    "pretrain": "pipeline.language_loss",
    "sft": "trl, pipeline.language_loss",
    "reward": "pipeline.reward.making",
    "ppo": "pipeline.ppo.trainer, pipeline.ppo.sharing",
    "evaluate": "pipeline.evaluation.judge",
}
"""What the stages import when they run."""


def clocked(*words: str) -> tuple[float, float]:
    """Returns processor and wall seconds of a Python process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="start-up of every stage")
    parser.add_argument("--runs", type=int, default=5)
    num_runs = parser.parse_args().runs
    commands = {f"{stage} --help": ("-m", f"stages.{stage}", "--help") for stage in STAGES}
    commands |= {
        f"{stage}: imports": ("-c", f"import {names}") for stage, names in LIBRARIES.items()
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(num_runs):
        for name, words in commands.items():
            found[name].append(clocked(*words))
    sys.stdout.write("| what | processor, s | wall, s |\n|---|---|---|\n")
    for name, runs in found.items():
        cells = (f"{median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in zip(*runs, strict=True))
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
