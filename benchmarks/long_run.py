"""Thousands of PPO updates in one process: memory, open files and disk must not grow.

Run     python -m benchmarks.long_run [--updates 2000]     prints the table of docs/recovery.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import psutil

ROWS = 10
"""Rows of the table."""
SECONDS = 1.0
"""Between two looks at the process."""
SETTINGS = ["--validate_every=50", "--saving.every=25", "--keep_rollout_every=0", "--threads=1"]


def main() -> None:
    """Makes the parents, runs the stage, and prints what it took as it went on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=2000)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory() as folder:
        run = f"RUN={folder}"
        make = ["make", "RECIPE=smoke", run, f"PYTHON={sys.executable}", "reward"]
        subprocess.run(make, check=True, capture_output=True)
        sys.stdout.write(table(list(watched(Path(folder), updates)), updates) + "\n")


def watched(folder: Path, updates: int) -> Iterator[dict[str, float]]:
    """Yields what a process of ppo takes, once a second until it ends."""
    words = ["--recipe=smoke", f"--run={folder}", "--tracking=none", f"--updates={updates}"]
    command = [sys.executable, "-m", "stages.ppo", *words, *SETTINGS]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as stage:
        process = psutil.Process(stage.pid)
        while stage.poll() is None:
            if update := last_update(folder / "ppo"):
                yield {"update": update, **figures(process, folder / "ppo")}
            time.sleep(SECONDS)
    if stage.returncode:
        raise SystemExit(f"ppo ended with {stage.returncode}")


def last_update(folder: Path) -> int:
    """Returns the last update that was logged whole."""
    log = folder / "timings.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def figures(process: psutil.Process, folder: Path) -> dict[str, float]:
    """Returns resident memory, open files, threads, and bytes on disk."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    logs = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    return {
        "memory_mb": process.memory_info().rss / 1e6,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "disk_mb": (sum(sizes) - logs) / 1e6,
        "logs_mb": logs / 1e6,
    }


def table(looks: list[dict[str, float]], updates: int) -> str:
    """Returns means over equal parts of the run, as Markdown."""
    lines = [
        "| updates | memory, MB | open files | threads | disk without logs, MB | logs, MB |",
        "|---|---|---|---|---|---|",
    ]
    for part in range(ROWS):
        first, last = (updates * edge // ROWS for edge in (part, part + 1))
        seen = [look for look in looks if first < look["update"] <= last]
        means = {name: mean(look[name] for look in seen) for name in seen[0]}
        lines.append(
            f"| {first + 1:,} to {last:,} | {means['memory_mb']:.1f} | {means['files']:.1f} | "
            f"{means['threads']:.1f} | {means['disk_mb']:.2f} | {means['logs_mb']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
