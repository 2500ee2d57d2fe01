"""Speed and peak memory of `data` and `tokenizer` on a large JSONL file of made-up rows.

Words are drawn from a made-up vocabulary of 50,000 by Zipf's law. A row of text is a conversation
of two to eight turns, a row of instructions a prompt and its reply; one prompt in twenty repeats.

Run     python -m benchmarks.streaming [--megabytes=1000 --types=text,instructions --folder=/tmp]
        prints the table of docs/costs.md; the disk needs three times the file's size
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
VOCABULARY = 50_000
TURN_WORDS = 24
"""Mean number of words in a turn."""


def turns(seed: int) -> Iterator[str]:
    """Returns made-up turns without end."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(SYLLABLES, k=1 + n % 4)) for n in range(VOCABULARY)]
    weights = list(accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))
    while True:
        drawn = iter(generator.choices(words, cum_weights=weights, k=100_000))
        for _ in range(100_000 // (2 * TURN_WORDS)):
            length = generator.randint(2, 2 * TURN_WORDS)
            yield " ".join(word for word, _ in zip(drawn, range(length), strict=False)) + "."


def text_row(source: Iterator[str], generator: random.Random) -> dict[str, Any]:
    """Returns a conversation."""
    said = [next(source) for _ in range(2 * generator.randint(1, 4))]
    roles = ("user", "assistant") * (len(said) // 2)
    turned = zip(roles, said, strict=True)
    return {"messages": [{"role": role, "content": turn} for role, turn in turned]}


def instruction_row(source: Iterator[str], generator: random.Random) -> dict[str, Any]:
    """Returns a prompt and a reply to it."""
    prompt = next(source)
    if generator.random() < 1 / 20:
        prompt = " ".join(prompt.split()[:2])
    return {"prompt": prompt, "completion": next(source)}


ROWS: dict[str, Callable[[Iterator[str], random.Random], dict[str, Any]]] = {
    "text": text_row,
    "instructions": instruction_row,
}


def write_file(path: Path, row_type: str, *, num_bytes: int) -> int:
    """Writes a JSONL file of at least so many bytes; returns the number of rows."""
    source, generator = turns(seed=1), random.Random(2)
    rows = size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < num_bytes:
            size += file.write(json.dumps(ROWS[row_type](source, generator)) + "\n")
            rows += 1
    return rows


def run_stage(stage: str, *settings: str) -> tuple[float, float]:
    """Returns seconds and peak megabytes of a stage in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"stages.{stage}", "--recipe=smoke", "--tracking=none"]
    process = subprocess.Popen([*command, *settings])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{stage} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6


def measure(row_type: str, folder: Path, *, num_bytes: int) -> None:
    """Prints one row a stage."""
    path = folder / f"{row_type}.jsonl"
    num_rows = write_file(path, row_type, num_bytes=num_bytes)
    size, run = path.stat().st_size / 1e6, f"--run={folder / 'run'}"
    none = ("--chats.source=none", "--ratings.source=none")
    stages = {
        "data": (run, *none, f"--{row_type}.path={path}"),
        "tokenizer": (run, "--vocabulary_size=8192", f"--rows=[{row_type}]"),
    }
    for stage, settings in stages.items():
        seconds, peak = run_stage(stage, *settings)
        cells = f"{size:,.0f} | {num_rows:,} | {seconds:.1f} | {size / seconds:.1f} | {peak:,.0f}"
        sys.stdout.write(f"| {stage} | {row_type} | {cells} |\n")
        sys.stdout.flush()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="speed and memory of data preparation")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--types", default="text,instructions")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    sys.stdout.write("| stage | rows of | MB | rows | seconds | MB/s | peak memory, MB |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for row_type in given.types.split(","):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            measure(row_type, Path(folder), num_bytes=given.megabytes * 1_000_000)


if __name__ == "__main__":
    main()
