"""Files on disk: JSON written atomically, digests, and what a folder holds."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

UNDIGESTED = ("manifest.json", "README.md", "timings.jsonl", "point.json")
"""Files that may differ between two runs of the same content, and the records of digests."""
CHECKPOINTS = "checkpoints"
"""Folder of resume points; the artifact's digest does not cover them."""


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
    """Returns what a text of JSON says; raises UserError, which names the place, when it is none."""
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


def fsync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """Returns a dataclass, a path or a number of numpy or torch as plain JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    return value.item()


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns digest and size of every file below a folder that digests cover."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        skipped = name in UNDIGESTED or path.name.startswith(".")
        if not skipped and not name.startswith(f"{CHECKPOINTS}/"):
            files[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    return files
