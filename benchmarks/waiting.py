"""What other work on the machine costs a step of two threads, and what waiting asleep saves of it.

Threads of libgomp wait for each other awake, which is the fastest way on an idle machine. Where
others want the processor too, the system takes it from the one that is waited for.

Run     python -m benchmarks.waiting [--steps 60]     prints the table of docs/costs.md
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

POLICIES = {"awake (as torch comes)": {}, "asleep": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = "while True: pass"
ROUNDS = 3
LONGEST = 20.0
"""Seconds after which a measurement ends with the steps that it has."""


def steps(count: int) -> list[float]:
    """Returns the seconds of training steps of a small model on two threads."""
    import torch
    from torch import nn

    torch.set_num_threads(2)
    layers = [nn.Sequential(nn.Linear(128, 344), nn.SiLU(), nn.Linear(344, 128)) for _ in range(4)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    rows, seconds = torch.randn(2048, 128), list[float]()
    while len(seconds) < count and sum(seconds) < LONGEST:
        start = time.perf_counter()
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measured(environment: dict[str, str], *, others: int, count: int) -> float:
    """Returns the mean seconds of a step beside so many busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
    try:
        words = [sys.executable, "-m", "benchmarks.waiting", "--alone", "--steps", str(count)]
        found = subprocess.run(
            words, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return float(found.stdout)


def main() -> None:
    """Prints the table, or the figure of one process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alone", action="store_true", help="one measurement, in this process")
    options = parser.parse_args()
    if options.alone:
        seconds = steps(options.steps)
        sys.stdout.write(f"{sum(seconds) / len(seconds)}")
        return
    lines = [
        "| threads wait | nothing beside, ms | one busy process | three |",
        "|---|---|---|---|",
    ]
    for name, environment in POLICIES.items():
        cells = []
        for others in (0, 1, 3):
            found = [
                1e3 * measured(environment, others=others, count=options.steps)
                for _ in range(ROUNDS)
            ]
            cells.append(f"{median(found):.0f} ({min(found):.0f} to {max(found):.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
