"""Run folders as stages leave them in the middle of their work."""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import sealed, write_json


def finished(folder: Path, *, summary: dict | None = None, **config) -> Path:
    """A finished stage without files."""
    content = {
        "format_version": 2,
        "stage": folder.name,
        "kind": "report",
        "config": config,
        "parents": {},
        "files": {},
    }
    about = {"summary": summary or {}, "wall_seconds": 90, "peak_memory_gib": 0.5}
    about |= {"num_processes": 1, "git_commit": "abc", "finished": "2026-01-01T00:00:00+00:00"}
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", sealed({"content": content, "circumstances": about}))
    return folder


def log(folder: Path, name: str, *rows: dict) -> None:
    """Appends rows to a log of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def trained(folder: Path, *, steps: int, of: int, begin: float = 1000.0) -> Path:
    """A stage that has taken some steps, two seconds each."""
    for step in range(1, steps + 1):
        log(folder, "metrics.jsonl", {"step": step, "train/loss": 1 / step, "policy/kl": step})
        log(folder, "timings.jsonl", {"step": step, "of": of, "at": begin + 2 * step, "time/s": 2})
    return folder


def held(folder: Path, *, pid: int | None = None, host: str | None = None, since: float) -> None:
    """The lock of a stage as its holder writes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    holder = {"pid": pid or os.getpid(), "host": host or platform.node(), "since": since}
    (folder.parent / f".{folder.name}.lock").write_text(json.dumps(holder) + "\n")


@contextlib.contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """A folder that vanishes for a while."""
    away = folder.with_name(f".{folder.name}.away")
    shutil.move(folder, away)
    yield
    shutil.move(away, folder)
