"""Files on disk: JSON written atomically, digests, and what a folder holds."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import UserError

UNDIGESTED = ("manifest.json", "README.md", "timings.jsonl", "point.json")
"""Files that may differ between two runs of the same content, and the records of digests."""
TORCH_WRITER = "inline_container.cc"
"""Source file that torch's writer names when it fails; it does not tell the system's error."""
CHECKPOINTS = "checkpoints"
"""Folder of resume points; the artifact's digest does not cover them."""


@contextlib.contextmanager
def telling_disk_trouble(folder: Path) -> Iterator[None]:
    """Turns the errors of libraries that failed to write into the disk's own.

    Raises:
        OSError: torch or safetensors could not write; the error number is the system's, where the
            library tells it, else that of a full disk.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None and TORCH_WRITER not in str(error):
            raise
        number = int(told[1]) if told else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(folder)) from error


def require_space(folder: Path, needed: int, *, what: str) -> None:
    """Checks that a disk has room before work begins that will need it.

    Args:
        folder: where the files will lie.
        needed: bytes.
        what: what they are for.

    Raises:
        UserError: there is less room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. Free "
            "some space, or choose another folder with RUN="
        )


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are not there.

    Raises:
        UserError: the file system takes no folders (/proc says so as if one above were missing).
        OSError: what else the system has against it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no folder can be made there. Choose another one with RUN="
        ) from error


def inside(folder: Path, name: str) -> Path:
    """Returns the place of a file by a name that was written down by whoever made the folder.

    Raises:
        UserError: the name, or a link on the way, leads out of the folder.
    """
    path = Path(folder) / name
    try:
        leaves = not path.resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a NUL
        leaves = True
    if leaves:
        raise UserError(
            f"{folder}: the name {name!r} leads out of the folder, so it is not used. Get the "
            "folder from its maker again, or delete it and make it anew"
        )
    return path


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; raises UserError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSON Lines file; none when it does not exist.

    Raises:
        UserError: it is not UTF-8, or a line is no JSON object; it is named.
    """
    if not path.is_file():
        return []
    rows = []
    for where, line in text_lines(path):
        row = parse_json(line, where=where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object")
        rows.append(row)
    return rows


def text_lines(path: Path) -> list[tuple[str, str]]:
    """Returns the lines of a text file, each with its place; a text may hold Unicode's own ends.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1)]


def parse_json(text: str, *, where: str) -> Any:
    """Returns what a text of JSON says; raises UserError, naming the place, when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False, default=plain)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Returns the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record with the digest of all it holds, which shows that a byte was changed."""
    parts = {name: part for name, part in record.items() if name != "sha256"}
    return {**parts, "sha256": digest_of(parts)}


def fsync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder: Path, names: Iterable[str]) -> None:
    """Waits until files of a folder are on the disk, by content and by name."""
    files = [folder / name for name in names]
    for path in [*files, *sorted({file.parent for file in files})]:
        fsync(path)


def plain(value: Any) -> Any:
    """Returns a dataclass, a path or a number of numpy or torch as plain JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    return value.item()


def faults(folder: Path, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns what is wrong with the files of a folder, by name: nothing when all are as recorded.

    Files are read side by side, since hashlib lets other threads work meanwhile.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _fault(folder / item[0], item[1]), recorded.items())
        return {name: fault for name, fault in zip(recorded, found, strict=True) if fault}


def _fault(path: Path, recorded: Mapping[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        same = path.stat().st_size == recorded["size"] and sha256_file(path) == recorded["sha256"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "was altered"


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, prefix=f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns digest and size of every file below a folder that digests cover."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        skipped = name in UNDIGESTED or path.name.startswith(".")
        if not skipped and not name.startswith(f"{CHECKPOINTS}/"):
            files[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    return files
