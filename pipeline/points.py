"""Resume points: written under another name, digested, renamed, rotated, and verified on opening.

Everything after the writing happens in a thread beside the training: the files are complete by
then and nobody changes them. Until a point is renamed the one before it counts.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.errors import UserError, line_of
from pipeline.manifest import FILES
from pipeline.shapes import each, holds, is_amount, is_object, is_text, is_whole, mapping
from pipeline.storage import (
    CHECKPOINTS,
    files_of,
    fsync,
    read_json,
    sealed,
    settle,
    write_json,
)

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
READABLE = (1, 2, 3)
"""Version 1 had no digests of itself and of the logs; up to version 2 those of ppo were numbered by
updates, since then all are numbered by optimizer steps."""
POINT = "point.json"
LOG = mapping({"size": holds(is_whole), "sha256": holds(is_text)})
RECORD = mapping(
    {
        "step": holds(is_whole),
        "key": holds(is_text),
        "elapsed_seconds": holds(is_amount),
        "files": FILES,
        "config?": holds(is_object),
        "parents?": holds(is_object),
        "chosen?": mapping({"precision?": holds(is_text), "attention?": holds(is_text)}),
    }
)
"""What is read of a point of any version."""
LOGS_OF = {1: each(holds(is_whole)), 2: each(LOG), 3: each(LOG)}
"""What it says of the logs, by version."""
LOGS = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")
REPRODUCIBLE = ("metrics.jsonl", "samples.jsonl")
"""Logs of which a point knows the digest; clocks are not worth a refusal."""


@dataclass
class Points:
    """The resume points of a stage at work.

    Attributes:
        stage: its name.
        folder: its folder.
        identity: what a point must have been made with: `key`, the digest of configuration and
            parents, and both of them in plain text.
        keep: how many points stay.
        chosen: what was left to the machine and is kept to, as the precision.
    """

    stage: str
    folder: Path
    identity: Mapping[str, Any]
    keep: int
    chosen: dict[str, str] = field(default_factory=dict)
    _beside: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    _pending: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None], *, seconds: float) -> None:
        """Writes a point; it is published while the stage goes on.

        Args:
            step: number the point is found by.
            write: writes the state's files into the folder it is given; called on every process.
            seconds: how long the stage has worked.

        Raises:
            OSError: this point could not be written, or the one before not published.
        """
        self.wait()
        temporary = self.folder / CHECKPOINTS / f".step-{step}.tmp"
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        try:
            write(temporary)
        except BaseException:
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        distributed.barrier()
        if distributed.is_main():
            sizes = {name: _size(self.folder / name) for name in LOGS}
            record = {"step": step, "elapsed_seconds": seconds, **self.identity}
            record |= {"chosen": self.chosen} if self.chosen else {}
            self._pending = self._beside.submit(self._publish, temporary, record, sizes)

    def wait(self) -> None:
        """Waits until the last point is published.

        Raises:
            OSError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _publish(self, temporary: Path, record: dict[str, Any], sizes: dict[str, int]) -> None:
        try:
            record["logs"] = {
                name: _log_record(self.folder / name, size) for name, size in sizes.items()
            }
            record |= {"format_version": FORMAT_VERSION, "files": files_of(temporary)}
            settle(temporary, record["files"])
            write_json(temporary / POINT, sealed(record))
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        final = temporary.with_name(f"step-{record['step']}")
        if final.exists():  # the same step again is the same state
            shutil.rmtree(temporary)
            return
        temporary.replace(final)
        fsync(final.parent)
        self._rotate()

    def _rotate(self) -> None:
        """Removes all but the newest points; one that is half removed has no point's name."""
        for old in self.found()[: -self.keep]:
            shutil.rmtree(old.replace(old.with_name(f".{old.name}.old")))

    def _tidy(self) -> None:
        """Removes what a killed process left half written or half removed."""
        folder = self.folder / CHECKPOINTS
        for left in folder.glob(".step-*") if folder.is_dir() else ():
            shutil.rmtree(left)

    def close(self) -> None:
        """Ends the thread once it has published what was written."""
        self._beside.shutdown()

    def found(self) -> list[Path]:
        """Returns the folders of all points, oldest first."""
        folder = self.folder / CHECKPOINTS
        found = folder.glob("step-*") if folder.is_dir() else ()
        return sorted(filter(_is_point, found), key=step_of)

    def latest(self) -> tuple[int, Path] | None:
        """Returns step and folder of the newest point, or None at a fresh start."""
        self.wait()
        found = self.found()
        return (step_of(found[-1]), found[-1]) if found else None

    def choose(self, name: str, wanted: str, here: Callable[[], str]) -> str:
        """Returns what a setting stands for whose `auto` leaves it to the machine.

        What was chosen when the stage began is kept to, on whatever machine it goes on: the newest
        point says it.

        Args:
            name: of the setting.
            wanted: its value.
            here: returns what this machine chooses; the main process asks it for all.
        """
        if wanted == "auto":
            mine, before = distributed.on_main(lambda: (here(), self._chosen_before()))
            wanted = before.get(name, mine)
            if distributed.is_main() and wanted != mine:
                told = "%s: goes on with %s %s, as it began; here it would be %s"
                log.info(told, self.stage, name, wanted, mine)
        self.chosen[name] = wanted
        return wanted

    def _chosen_before(self) -> dict[str, str]:
        """Returns what was chosen when the stage began, as the newest point says."""
        newest = self.latest()
        chosen: dict[str, str] = read_json(newest[1] / POINT).get("chosen", {}) if newest else {}
        return chosen

    def newest_good(self) -> dict[str, Any] | None:
        """Returns the record of the newest point that verifies; drops the newer ones, saying why.

        Raises:
            UserError: there are good points of other settings, which are not thrown away unasked.
        """
        self._tidy()
        for folder in reversed(self.found()):
            reason = fault_of(folder)
            if reason is None:
                point: dict[str, Any] = read_json(folder / POINT)
                if point["key"] == self.identity["key"]:
                    self._rotate()
                    return point
                reason = self._foreign(folder, point)
            told = line_of(reason)
            log.warning("%s: resume point %s is not used: %s", self.stage, folder, told)
            shutil.rmtree(folder)
        return None

    def _foreign(self, folder: Path, point: Mapping[str, Any]) -> str:
        """Returns why a point does not fit; refuses where throwing it away would lose work."""
        same_parents = point.get("parents") == self.identity["parents"]
        if same_parents and (changed := differences(point["config"], self.identity["config"])):
            raise UserError(
                f"{folder} was made with other settings ({changed}). Go on with those, or add "
                f"FORCE=1 to begin {self.stage} anew"
            )
        return "it belongs to another configuration or other parents"


def fault_of(folder: Path) -> str | None:
    """Returns what is wrong with a resume point on disk, or None."""
    try:
        point = read_json(folder / POINT)
    except (OSError, UserError) as error:
        return str(error)
    fault = _fault_of_record(point, step=step_of(folder))
    if fault is None and files_of(folder) != point["files"]:
        return f"a file is missing, damaged or foreign ({_first_fault(folder, point['files'])})"
    return fault or _fault_of_logs(folder.parent.parent, point)


def _fault_of_record(point: Any, *, step: int) -> str | None:
    """Returns what is wrong with what a point says of itself, or None."""
    if not is_object(point):
        return f"{POINT} is damaged"
    version = point.get("format_version", 1)
    if version not in READABLE:
        return f"its format {version} is unknown here"
    if (version > 1 or "sha256" in point) and sealed(point) != point:
        return f"{POINT} is damaged"
    place = mapping({"logs": LOGS_OF[version]})(point) or RECORD(point)
    if place is not None or point["step"] != step:
        return f"{POINT} is damaged: no {place or 'step of this point'}"
    return None


def _fault_of_logs(stage_folder: Path, point: Mapping[str, Any]) -> str | None:
    """Returns which log is not the one that a point goes on from, or None."""
    for name, size in log_sizes(point).items():
        path, record = stage_folder / name, point["logs"].get(name)
        if _size(path) < size:
            return f"{name} is shorter than it was then"
        digest = record["sha256"] if isinstance(record, dict) else ""
        if digest and _digest_of_start(path, size) != digest:
            return f"{name} was altered"
    return None


def log_sizes(point: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many bytes of each log a point knows of."""
    records = {name: point["logs"].get(name, 0) for name in LOGS}
    return {
        name: record["size"] if isinstance(record, dict) else record
        for name, record in records.items()
    }


def step_of(folder: Path) -> int:
    """Returns the number of a point's folder."""
    return int(folder.name.removeprefix("step-"))


def _is_point(folder: Path) -> bool:
    """Returns whether a folder has a point's name; what else lies there is somebody else's."""
    return folder.is_dir() and folder.name.removeprefix("step-").isdecimal()


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> str:
    """Returns the settings that differ, as `key: old there, new here`."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name}: {old} there, {new} here")
    return "; ".join(text for text in found if text)


def _first_fault(folder: Path, recorded: Mapping[str, Any]) -> str:
    there = files_of(folder)
    names = sorted(recorded.keys() | there.keys())
    return next(name for name in names if there.get(name) != recorded.get(name))


def _log_record(path: Path, size: int) -> dict[str, Any]:
    """Returns size and digest of a log's first bytes, which are on the disk then."""
    if path.is_file():
        fsync(path)
    sha256 = _digest_of_start(path, size) if path.name in REPRODUCIBLE else ""
    return {"size": size, "sha256": sha256}


def _digest_of_start(path: Path, size: int) -> str:
    """Returns the SHA-256 of a file's first bytes; that of nothing when there is no file."""
    digest, left = hashlib.sha256(), size
    if path.is_file():
        with path.open("rb") as file:
            while left and (block := file.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
