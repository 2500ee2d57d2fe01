"""The runs below a folder, and how far each stage of them is.

Nothing here writes, and nothing outside the folder is read: links that lead out are left alone.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.dashboard.logs import is_finite, newest_rows
from pipeline.errors import UserError
from pipeline.lock import Holder, holder_of
from pipeline.manifest import CHAIN, MANIFEST, STAGES, read_manifest
from pipeline.points import LOGS, step_of
from pipeline.shapes import is_amount
from pipeline.storage import CHECKPOINTS

SHOWN = (*STAGES, "seeds")
"""Folders of a run that are shown, in their order."""
DEEPEST = 3
"""Folders between the root and a run, as in RUN=runs/sweep/a."""
UNSEEN_SECONDS = 600.0
"""How long a stage of another machine counts as running after it wrote last."""
PACE_ROWS = 20
"""Rows of timings over which the pace is taken."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run as it stands."""

    name: str
    folder: Path
    state: str
    """missing, running, stopped, finished or damaged."""
    step: float = 0.0
    """The last step that was logged."""
    of: float = 0.0
    """Steps in all; 0 when not known."""
    seconds_per_step: float = 0.0
    """Pace of the last rows, saving and validation included; 0 when not known."""
    since: float = 0.0
    """When the session that is running began, in seconds since 1970."""
    touched: float = 0.0
    """When its logs or its manifest were written last."""
    point: int | None = None
    """Step of the newest resume point."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float:
        """Seconds until the last step at the pace of now; 0 when not known."""
        return max(0.0, self.of - self.step) * self.seconds_per_step


class Runs:
    """The runs below a root; manifests are read once, until they change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._manifests: dict[Path, tuple[int, Any]] = {}

    def found(self) -> dict[str, Path]:
        """Returns the folders of all runs by their names below the root."""
        folders = _runs_below(self.root, self.root.resolve(), depth=DEEPEST)
        return {folder.relative_to(self.root).as_posix(): folder for folder in sorted(folders)}

    def stages(self, folder: Path) -> list[Stage]:
        """Returns the stages of a run in their order; optional ones only where they were begun."""
        there = _folders(folder, self.root.resolve())
        return [
            self._stage(folder, name, there.get(name))
            for name in SHOWN
            if name in there or (name in CHAIN and "seeds" not in there)
        ]

    def _stage(self, run: Path, name: str, folder: Path | None) -> Stage:
        holder = holder_of(run / f".{name}.lock")
        path = folder or run / name
        files = _files(path, self.root.resolve()) if folder else {}
        touched = max(
            (files[log].st_mtime for log in (*LOGS, MANIFEST) if log in files), default=0.0
        )
        about: dict[str, Any] = {"name": name, "folder": path, "touched": touched}
        runs, remarks = _is_running(holder, touched)
        if runs and holder is not None:
            about |= {"since": holder.since, **_progress(files, path, since=holder.since)}
            return Stage(state="running", point=newest_point(path), remarks=remarks, **about)
        if MANIFEST in files:
            return self._finished(about, files[MANIFEST])
        if folder is None:
            return Stage(state="missing", **about)
        point = newest_point(path)
        about |= _progress(files, path, since=0.0)
        return Stage(state="stopped", point=point, remarks=remarks, **about)

    def _finished(self, about: dict[str, Any], file: os.stat_result) -> Stage:
        path: Path = about["folder"]
        version, told = self._manifests.get(path, (0, None))
        if version != file.st_mtime_ns:
            try:
                told = read_manifest(path)
            except (UserError, OSError) as error:
                told = str(error)
            self._manifests[path] = (file.st_mtime_ns, told)
        if isinstance(told, str):
            return Stage(state="damaged", remarks=(told,), **about)
        return Stage(state="finished", manifest=told, **about)


def newest_point(folder: Path) -> int | None:
    """Returns the step of the newest resume point of a stage, which is not verified."""
    try:
        names = [entry for entry in (folder / CHECKPOINTS).iterdir() if _is_point(entry.name)]
    except OSError:
        return None
    return max(map(step_of, names), default=None)


def _is_point(name: str) -> bool:
    start, _, number = name.partition("-")
    return start == "step" and number.isascii() and number.isdigit() and len(number) < 20


def _is_running(holder: Holder | None, touched: float) -> tuple[bool, tuple[str, ...]]:
    """Returns whether a stage is at work, and what there is to say of it."""
    if holder is None:
        return False, ()
    if holder.is_here:
        gone = (f"process {holder.pid}, which worked on it, is gone",)
        return (True, ()) if holder.is_alive() else (False, gone)
    quiet = time.time() - max(touched, holder.since)
    whose = f"process {holder.pid} of {holder.host}, which cannot be seen from here"
    if quiet < UNSEEN_SECONDS:
        return True, (whose,)
    return False, (f"{whose}, has written nothing for {quiet / 60:.0f} min",)


def _progress(files: Mapping[str, os.stat_result], path: Path, *, since: float) -> dict[str, float]:
    """Returns how far a stage is and how fast, from the ends of its logs."""
    rows = newest_rows(path / "timings.jsonl") if "timings.jsonl" in files else []
    logged = newest_rows(path / "metrics.jsonl") if "metrics.jsonl" in files else []
    steps = [row["step"] for row in (*rows[-1:], *logged[-1:])]
    told = {"step": float(max(steps, default=0)), "of": _amount(rows[-1], "of") if rows else 0.0}
    paced = [row for row in rows if _amount(row, "at") > since][-PACE_ROWS:]
    if len(paced) > 1 and paced[-1]["step"] > paced[0]["step"]:
        seconds = max(0.0, _amount(paced[-1], "at") - _amount(paced[0], "at"))
        told["seconds_per_step"] = seconds / (paced[-1]["step"] - paced[0]["step"])
    return told


def _amount(row: Mapping[str, Any], name: str) -> float:
    """Returns a number from 0 on of a row, 0 where there is none."""
    value: Any = row.get(name)
    return float(value) if is_amount(value) and is_finite(value) else 0.0


def _runs_below(folder: Path, root: Path, *, depth: int) -> Iterator[Path]:
    """Yields the folders that hold a stage's folder or lock, without looking into them further."""
    there = _folders(folder, root)
    if folder != root and any(name in there or _has_lock(folder, name) for name in SHOWN):
        yield folder
    elif depth:
        for inner in there.values():
            yield from _runs_below(inner, root, depth=depth - 1)


def _has_lock(folder: Path, stage: str) -> bool:
    return (folder / f".{stage}.lock").is_file()


def _folders(folder: Path, root: Path) -> dict[str, Path]:
    """Returns the folders in a folder by name; no hidden ones, and none outside the root."""
    return {
        entry.name: folder / entry.name
        for entry in _entries(folder)
        if not entry.name.startswith(".") and _stays(entry, root) and entry.is_dir()
    }


def _files(folder: Path, root: Path) -> dict[str, os.stat_result]:
    """Returns the plain files in a folder with what the system says of them, in the same way."""
    return {
        entry.name: entry.stat()
        for entry in _entries(folder)
        if _stays(entry, root) and entry.is_file()
    }


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # gone, or not ours to read
        return []


def _stays(entry: os.DirEntry[str], root: Path) -> bool:
    try:
        return not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False
