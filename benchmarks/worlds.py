"""The same training by one process, two and four: how far the curves lie apart.

Run     python -m benchmarks.worlds [--processes 1 2 4] [--stages sft reward ppo]

Smoke sizes, float32, the same seed and global minibatch. Prints the table of docs/cluster.md, and
ends with 1 where a curve of the loss is further from that of the first number of processes than
the tolerance.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = ("pretrain", "sft", "reward", "ppo")
COMMON = "--tracking=none --threads=1 --saving.every=0"
TRAINING = f"{COMMON} --training.steps=20 --training.log_every=1 --training.eval_every=5"
SETTINGS = {
    "pretrain": f"{TRAINING} --training.microbatch_size=2",
    "sft": f"{TRAINING} --training.microbatch_size=2",
    "reward": f"{TRAINING} --training.minibatch_size=4 --training.microbatch_size=1",
    "ppo": f"{COMMON} --updates=4 --validate_every=1",
}
LOSS = {"ppo": "policy/loss", **dict.fromkeys(STAGES[:3], "train/loss")}
TOLERANCE = 1e-4
"""Of the loss, over all steps."""


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    lines = [
        "| stage | processes | rows | loss, largest | any figure, first row | last row |",
        "|---|---|---|---|---|---|",
    ]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "reward", processes=1)
        for stage in options.stages:
            curves = {n: curve(Path(folder), stage, processes=n) for n in options.processes}
            first = curves.pop(options.processes[0])
            for processes, rows in curves.items():
                far = max(distances(first, rows, only=LOSS[stage]))
                anything = distances(first, rows)
                worst = max(worst, far)
                lines.append(
                    f"| {stage} | {options.processes[0]} and {processes} | {len(rows)} | {far:.1e} "
                    f"| {anything[0]:.1e} | {anything[-1]:.1e} |"
                )
    sys.stdout.write("\n".join(lines) + "\n")
    return int(worst > TOLERANCE)


def make(folder: Path, stage: str, *, processes: int, settings: str = COMMON) -> None:
    """Runs a stage as a user does."""
    words = ["make", stage, "RECIPE=smoke", f"RUN={folder}", f"PYTHON={sys.executable}"]
    words += [f"NPROC={processes}", f"ARGS={settings}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def curve(parents: Path, stage: str, *, processes: int) -> list[dict[str, float]]:
    """Returns the rows of metrics of a stage that so many processes make of the same parents."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        behind = STAGES[STAGES.index(stage) :]
        shutil.copytree(parents, run, ignore=shutil.ignore_patterns(*behind, ".*"))
        make(run, stage, processes=processes, settings=SETTINGS[stage])
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def distances(
    ones: list[dict[str, float]], others: list[dict[str, float]], *, only: str = ""
) -> list[float]:
    """Returns the largest difference of any figure, or of one, row by row."""
    assert [row["step"] for row in ones] == [row["step"] for row in others]
    return [
        max(abs(one[name] - other[name]) for name in one if only in ("", name))
        for one, other in zip(ones, others, strict=True)
        if not only or only in one
    ]


if __name__ == "__main__":
    raise SystemExit(main())
