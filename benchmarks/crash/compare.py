"""What differs between a stage's folder and the one of a straight run, named."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from benchmarks.crash.chain import points
from pipeline.storage import CHECKPOINTS, digest_of

MANIFEST = "manifest.json"
CLOCKS = "timings.jsonl"
"""Rows of clocks: only their steps are compared."""
POINT = "point.json"
TIMED = ("elapsed_seconds", "sha256")
"""What a point says of itself that depends on clocks."""
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError)
"""What the readers raise at a damaged file."""
SHOWN = 60
"""Characters of a value that are shown."""


def differences(found: Path, straight: Path) -> list[str]:
    """Returns one line for each difference between a finished folder and the straight run's.

    Compared are all files byte by byte, the manifest's content part, and the resume points: the
    newest, and others that both have. A signal may leave a point where the straight run has none,
    but never more points. Clocks may differ.
    """
    lines = _names(found, straight)
    for name in sorted(_files(found) & _files(straight) - {MANIFEST}):
        lines += _of_file(found / name, straight / name, name)
    lines += _of_manifest(found / MANIFEST, straight / MANIFEST)
    return lines + _of_points(found, straight)


def _files(folder: Path) -> set[str]:
    names = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    return {name.as_posix() for name in names if name.parts[0] != CHECKPOINTS}


def _names(found: Path, straight: Path) -> list[str]:
    ours, theirs = _files(found), _files(straight)
    lines = [f"{name} is missing" for name in sorted(theirs - ours)]
    lines += [f"{name} was left over" for name in sorted(ours - theirs)]
    empty = (path for path in found.rglob("*") if path.is_dir() and not any(path.iterdir()))
    return lines + [f"{path.relative_to(found)}/ was left over, empty" for path in sorted(empty)]


def _of_file(found: Path, straight: Path, name: str) -> list[str]:
    if found.name == CLOCKS:
        steps = [[row["step"] for row in read_rows(path)] for path in (found, straight)]
        line = rows_difference(*steps)
        return [f"{name}, steps: {line}"] if line else []
    ours, theirs = found.read_bytes(), straight.read_bytes()
    if ours == theirs:
        return []
    read = READERS.get(found.suffix)
    if read is None:
        return [f"{name}: {_bytes_difference(ours, theirs)}"]
    compare = rows_difference if read in (read_rows, read_table) else difference
    try:
        line = compare(read(found), read(straight)) or "the same values in other bytes"
    except UNREADABLE:
        line = f"unreadable, {_bytes_difference(ours, theirs)}"
    return [f"{name}: {line}"]


def _of_manifest(found: Path, straight: Path) -> list[str]:
    if not found.is_file():
        return []  # named among the missing files
    contents = [read_json(path)["content"] for path in (found, straight)]
    digests = [digest_of(content) for content in contents]
    line = difference(*contents)
    return [f"{MANIFEST}, content: {line}"] if line or digests[0] != digests[1] else []


def _of_points(found: Path, straight: Path) -> list[str]:
    ours, theirs = points(found), points(straight)
    lines = []
    entries = set((found / CHECKPOINTS).glob("*")) - set(ours)
    lines += [f"{path.relative_to(found)} was left over" for path in sorted(entries)]
    if len(ours) > len(theirs):
        lines.append(f"{len(ours)} resume points instead of {len(theirs)}")
    if theirs and [p.name for p in ours[-1:]] != [theirs[-1].name]:
        newest = ours[-1].name if ours else "none"
        lines.append(f"the newest resume point is {newest} instead of {theirs[-1].name}")
    names = {point.name for point in ours}
    for point in theirs:
        if point.name in names:
            lines += _of_point(found / CHECKPOINTS / point.name, point)
    return lines


def _of_point(found: Path, straight: Path) -> list[str]:
    place = f"{CHECKPOINTS}/{straight.name}"
    lines = [f"{place}/{line}" for line in _names(found, straight)]
    for name in sorted(_files(found) & _files(straight) - {POINT}):
        lines += _of_file(found / name, straight / name, f"{place}/{name}")
    records = [_without_clocks(read_json(path / POINT)) for path in (found, straight)]
    line = difference(*records)
    return lines + ([f"{place}/{POINT}: {line}"] if line else [])


def _without_clocks(point: dict[str, Any]) -> dict[str, Any]:
    """What a point says of itself, less its seconds, the clocks' log, and the digest over them."""
    kept = {name: value for name, value in point.items() if name not in TIMED}
    return kept | {"logs": {k: v for k, v in point.get("logs", {}).items() if k != CLOCKS}}


def difference(found: Any, expected: Any, place: str = "") -> str | None:
    """Returns the first place where two nested values differ, and how; None when they do not."""
    where = f"{place}: " if place else ""
    if isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"{where}names {_shown(sorted(map(str, found.keys() ^ expected.keys())))}"
        pairs = [(found[name], expected[name], f"{place}/{name}") for name in expected]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{where}{len(found)} values instead of {len(expected)}"
        pairs = [
            (a, b, f"{place}/{i}") for i, (a, b) in enumerate(zip(found, expected, strict=False))
        ]
    elif hasattr(found, "dtype") and hasattr(expected, "dtype"):
        return _array_difference(found, expected, where)
    else:
        # nan is not equal to itself, but written alike
        same = repr(found) == repr(expected)
        return None if same else f"{where}{_shown(found)} instead of {_shown(expected)}"
    lines = (difference(ours, theirs, at.lstrip("/")) for ours, theirs, at in pairs)
    return next((line for line in lines if line is not None), None)


def _array_difference(found: Any, expected: Any, where: str) -> str | None:
    """The difference of two tensors or arrays, by their bytes."""
    shapes = [(str(each.dtype), tuple(each.shape)) for each in (found, expected)]
    if shapes[0] != shapes[1]:
        return f"{where}{shapes[0]} instead of {shapes[1]}"
    ours, theirs = (
        [repr(value) for value in each.reshape(-1).tolist()] for each in (found, expected)
    )
    places = [
        index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]
    ]
    if not places:
        return None
    first = places[0]
    return (
        f"{where}{len(places)} of {len(ours)} numbers differ, number {first} first: "
        f"{ours[first]} instead of {theirs[first]}"
    )


def rows_difference(found: list[Any], expected: list[Any]) -> str | None:
    """Returns the first row that is doubled, missing or different; None when all are equal."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=False), start=1):
        line = difference(ours, theirs)
        if line is None:
            continue
        if ours in found[: number - 1]:
            return f"row {number} is row {found.index(ours) + 1} again"
        if ours in expected[number:]:
            return f"row {number} is missing: row {expected.index(ours) + 1} stands there"
        return f"row {number}, {line}"
    if len(found) > len(expected):
        extra = found[len(expected)]
        again = f", row {found.index(extra) + 1} again" if extra in expected else ""
        return f"{len(found)} rows instead of {len(expected)}{again}"
    return f"{len(found)} rows instead of {len(expected)}" if len(found) < len(expected) else None


def _bytes_difference(found: bytes, expected: bytes) -> str:
    pairs = enumerate(zip(found, expected, strict=False))
    first = next((index for index, pair in pairs if pair[0] != pair[1]), None)
    sizes = f"{len(found)} bytes instead of {len(expected)}"
    return sizes if first is None else f"byte {first} differs first ({sizes})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Any]:
    """Returns the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(path: Path) -> list[Any]:
    """Returns the rows of a Parquet file."""
    from pyarrow import parquet

    rows: list[Any] = parquet.read_table(path).to_pylist()
    return rows


def read_weights(path: Path) -> Any:
    """Returns the tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def read_state(path: Path) -> Any:
    """Returns what torch saved: tensors, and numpy's generator state."""
    import numpy as np
    import torch

    rebuild = np._core.multiarray._reconstruct  # noqa: SLF001 - its pickles name it
    allowed = [rebuild, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True)


READERS = {
    ".json": read_json,
    ".jsonl": read_rows,
    ".parquet": read_table,
    ".safetensors": read_weights,
    ".pt": read_state,
    ".pth": read_state,
}
