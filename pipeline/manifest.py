"""The records of a folder, as they are read: a manifest, and what a resume point says of itself.

Whoever wrote them, they are JSON that a disk, an editor or another program may have changed; after
these checks the rest of the code may rely on every place it reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.shapes import (
    are_texts,
    each,
    holds,
    is_amount,
    is_digest,
    is_object,
    is_text,
    is_whole,
    mapping,
)
from pipeline.storage import read_json

T = TypeVar("T")

FILES = each(mapping({"sha256": holds(is_digest), "size": holds(is_whole)}))
CONTENT = mapping(
    {
        "stage": holds(is_text),
        "kind": holds(is_text),
        "config": holds(is_object),
        "parents": each(mapping({"digest": holds(is_digest)})),
        "files": FILES,
    }
)
CIRCUMSTANCES = mapping(
    {
        "summary": holds(is_object),
        "wall_seconds": holds(is_amount),
        "peak_memory_gib": holds(is_amount),
        "num_processes": holds(is_whole),
        "git_commit": holds(is_text),
        "overrides?": holds(are_texts),
    }
)
MANIFEST = mapping({"content": CONTENT, "circumstances": CIRCUMSTANCES})
POINT = mapping(
    {
        "step": holds(is_whole),
        "key": holds(is_digest),
        "elapsed_seconds": holds(is_amount),
        "logs": each(holds(is_whole)),
        "files": FILES,
    }
)


def check_manifest(manifest: Any, *, where: Path, mend: str) -> None:
    """Checks what was read of a manifest.

    Args:
        manifest: what the file held.
        where: the file.
        mend: the command that makes the folder anew.

    Raises:
        UserError: a place is missing or holds something else; it is named.
    """
    fault = MANIFEST(manifest)
    if fault is None and not is_object(manifest):
        fault = "a text or a level that cannot be written again"
    if fault is not None:
        raise UserError(f"{where} is damaged ({fault or 'no object'}). Run: {mend}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder whose files are not looked at.

    Raises:
        UserError: it is no JSON, or damaged.
    """
    path = folder / "manifest.json"
    manifest: dict[str, Any] = read_json(path)
    check_manifest(manifest, where=path, mend=f"make {folder.name} FORCE=1")
    return manifest


def parse_point(folder: Path) -> dict[str, Any]:
    """Returns what a resume point says of itself.

    Raises:
        UserError: it is no JSON, a place is missing or holds something else, or it is the record
            of another point.
    """
    point: Any = read_json(folder / "point.json")
    fault = POINT(point)
    if fault is None and folder.name != f"step-{point['step']}":
        fault = "step"
    if fault is not None:
        raise UserError(f"its point.json is damaged ({fault or 'no object'})")
    checked: dict[str, Any] = point
    return checked


def setting_of(config: Mapping[str, Any], name: str, kind: type[T], *, where: Path) -> T:
    """Returns a setting that a parent was made with.

    Args:
        config: of the parent's manifest.
        name: the setting.
        kind: its type.
        where: the parent's folder.

    Raises:
        UserError: it is not there, or of another type.
    """
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            f"{where}/manifest.json: config.{name} is {value!r}. Run: make {where.name} FORCE=1"
        )
    return value
