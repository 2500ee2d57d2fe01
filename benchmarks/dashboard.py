"""Times the dashboard's answers on invented runs: one with a very long log, and very many.

Run  python -m benchmarks.dashboard
"""

import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.dashboard.views import Views
from pipeline.manifest import CHAIN
from pipeline.storage import sealed, write_json

ROWS = 100_000
METRICS = 8
RUNS = 200


def write_log(folder: Path) -> None:
    """Writes a log of many rows."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(ROWS):
            row = {f"train/metric_{n}": math.sin(step * n / 1000) for n in range(METRICS)}
            file.write(json.dumps({"step": step, **row}) + "\n")


def write_runs(root: Path) -> None:
    """Writes many finished runs."""
    about = {"summary": {"loss": 1.0}, "wall_seconds": 1, "peak_memory_gib": 1}
    about |= {"num_processes": 1, "git_commit": ""}
    for number in range(RUNS):
        for stage in CHAIN:
            content = {"format_version": 2, "stage": stage, "kind": "report"}
            content |= {"config": {"seed": number}, "parents": {}, "files": {}}
            folder = root / f"run-{number}" / stage
            folder.mkdir(parents=True)
            manifest = {"content": content, "circumstances": about}
            write_json(folder / "manifest.json", sealed(manifest))


def timed(name: str, action: Callable[[], object]) -> None:
    """Prints the processor time of two calls."""
    for which in ("first", "again"):
        began = time.process_time()
        action()
        print(f"{name}, {which}: {time.process_time() - began:.2f} s")  # noqa: T201


def main() -> None:
    """Prints the times."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_log(root / "long" / "pretrain")
        write_runs(root)
        views = Views(root)
        timed(f"{RUNS + 1} runs, overview", views.overview)
        timed(f"{ROWS:,} rows of {METRICS} metrics", lambda: views.curves(["long"], "pretrain"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory: {peak:.0f} MiB")  # noqa: T201


if __name__ == "__main__":
    main()
