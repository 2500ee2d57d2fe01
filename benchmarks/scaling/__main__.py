"""Weak and strong scaling of ppo from one process to two, by phase, and where the time goes.

Each run is the smoke stage as a user starts it, one thread a process, processes in turns. Strong
scaling keeps the prompts of an update, weak scaling gives each process as many. The first update,
which warms up, is left out. Of the phases' seconds those in collectives (waiting for the other and
sending) are told apart, and beside them what training waits for a resume point after every update.
idle_frac is the share of the whole stage's seconds in which a process does not compute.

Run     python -m benchmarks.scaling [--parents=runs/smoke --runs=3 --updates=4]
        prints the table of docs/scaling.md; an idle machine of two cores is needed
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROMPTS = 32
LENGTH = 64
PHASES = ("rollout", "score", "optimise")
NOT_COMPUTING = ("collectives", "saving")
CASES = {"one": (1, 1), "strong": (2, 1), "weak": (2, 2)}
"""Number of processes, and of shares of PROMPTS, of each case."""


def run_stage(parents: Path, *, processes: int, prompts: int, updates: int) -> dict[str, float]:
    """Returns median seconds of an update by phase, and the share of the stage's time idle."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data", "tokenizer", "pretrain", "sft", "reward"):
            (Path(folder) / name).symlink_to((parents / name).resolve())
        launcher = ["pipeline.launch", "2"] if processes == 2 else []
        words = [
            sys.executable, "-m", *launcher, "stages.ppo", "--recipe=smoke", f"--run={folder}",
            "--tracking=none", "--threads=1", "--workers=1", f"--updates={updates}",
            f"--prompts_per_update={prompts}", f"--minibatch_size={prompts // 4}",
            f"--microbatch_size={PROMPTS // 8}", f"--max_response_tokens={LENGTH}",
            "--validate_every=1000", "--saving.every=1",
        ]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen(words)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"ppo ended with {process.returncode}")
        wall = time.perf_counter() - start
        lines = (Path(folder) / "ppo" / "timings.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    seconds = {
        name: median(row.get(f"time/{name}_seconds", 0.0) for row in rows)
        for name in (*PHASES, *NOT_COMPUTING)
    }
    busy = usage.ru_utime + usage.ru_stime
    update = sum(seconds[name] for name in PHASES)
    return {**seconds, "update": update, "idle_frac": 1 - busy / (wall * processes)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="scaling of ppo from one process to two")
    parser.add_argument("--parents", type=Path, default=Path("runs/smoke"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(given.runs):
        for name, (processes, shares) in CASES.items():
            prompts = shares * PROMPTS
            found[name].append(
                run_stage(
                    given.parents, processes=processes, prompts=prompts, updates=given.updates
                )
            )
    sys.stdout.write("| phase | one process, s | strong: two, s | efficiency | weak: two, s |")
    sys.stdout.write(" efficiency |\n|---|---|---|---|---|---|\n")
    for phase in (*PHASES, "update", *NOT_COMPUTING, "idle_frac"):
        one, strong, weak = ([run[phase] for run in found[name]] for name in CASES)
        cells = [f"{median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in (one, strong, weak)]
        if phase in (*NOT_COMPUTING, "idle_frac"):
            cells = [cells[0], cells[1], "", cells[2], ""]
        else:
            efficient = f"{median(one) / median(strong) / 2:.2f}"
            cells = [cells[0], cells[1], efficient, cells[2], f"{median(one) / median(weak):.2f}"]
        sys.stdout.write(f"| {phase} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
