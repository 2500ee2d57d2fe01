"""Logs that are being written to: read as they grow, thinned out, whatever may be damaged in them.

A stage that goes on from a resume point shortens its logs, so a log is read anew when what was
read last no longer stands where it stood.
"""

import itertools
import json
import math
import threading
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.shapes import is_number

NO_CURVES = ("step", "of", "at")
"""Numbers of a row that tell where it stands."""
LONGEST_LINE = 2**22
"""Bytes of a line; what is longer is no row of a log."""
REMEMBERED = 256
"""Bytes before the place that was read last, by which a log that was rewritten is told."""
TAIL = 2**18
"""Bytes of a log's end in which its newest rows are looked for."""

Points = tuple[list[float], list[float]]


class Log:
    """The curves of a JSON Lines file, which `refresh` brings up to date; safe between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._offset, self._before = 0, b""
        self._curves: dict[str, tuple[array[float], array[float]]] = {}
        self._num_lines = self._num_infinite = 0
        self._damaged: list[int] = []

    def points(self, *, most: int) -> tuple[dict[str, Points], list[str]]:
        """Returns the curves as they are now, and what was left out of them.

        Args:
            most: points of a curve; of a longer one the extremes of each stretch are kept.
        """
        with self._lock:
            self._refresh()
            curves = {
                name: thinned(np.array(steps), np.array(values), most=most)
                for name, (steps, values) in self._curves.items()
            }
            return curves, self._remarks()

    def _refresh(self) -> None:
        file = _opened(self.path)
        if file is None:
            self._clear()
            return
        with file:
            if self._was_rewritten(file):
                self._clear()
            file.seek(self._offset)
            while line := file.readline(LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    break  # half written; the rest comes
                self._offset += len(line)
                self._take(line)
            file.seek(max(0, self._offset - REMEMBERED))
            self._before = file.read(min(self._offset, REMEMBERED))

    def _was_rewritten(self, file: IO[bytes]) -> bool:
        file.seek(max(0, self._offset - REMEMBERED))
        return file.read(len(self._before)) != self._before

    def _take(self, line: bytes) -> None:
        self._num_lines += 1
        row = row_of(line)
        if row is None:
            self._damaged.append(self._num_lines)
            return
        for name, value in row.items():
            if name in NO_CURVES or type(value) not in (int, float):
                continue
            if not is_finite(value):
                self._num_infinite += 1
                continue
            if name not in self._curves:
                self._curves[name] = (array("d"), array("d"))
            steps, values = self._curves[name]
            steps.append(row["step"])
            values.append(value)

    def _remarks(self) -> list[str]:
        told = []
        if self._damaged:
            where = f"line {self._damaged[0]}"
            more = f" and {len(self._damaged) - 1} more" if len(self._damaged) > 1 else ""
            told.append(f"{self.path.name}: {where}{more} damaged, left out")
        if self._num_infinite:
            told.append(f"{self.path.name}: {self._num_infinite} values not finite, left out")
        return told


def thinned(steps: np.ndarray, values: np.ndarray, *, most: int) -> Points:
    """Returns at most that many points: the first, the last, lowest and highest of each stretch.

    So no spike is lost, which every n-th point would.
    """
    if len(steps) > most:
        edges = np.linspace(1, len(steps) - 1, (most - 2) // 2 + 1).astype(int)
        chosen = {0, len(steps) - 1}
        for start, end in itertools.pairwise(edges.tolist()):
            part = values[start:end]
            chosen |= {start + int(part.argmin()), start + int(part.argmax())}
        order = sorted(chosen)
        steps, values = steps[order], values[order]
    return steps.tolist(), [float(f"{value:.6g}") for value in values.tolist()]


def row_of(line: bytes) -> dict[str, Any] | None:
    """Returns a row of a log, or None of what is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    has_step = isinstance(row, dict) and is_number(row.get("step")) and is_finite(row["step"])
    return row if has_step else None


def is_finite(value: Any) -> bool:
    """Returns whether a number of JSON, where it may have any number of digits, is a finite one."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def newest_rows(path: Path, *, size: int = TAIL) -> list[dict[str, Any]]:
    """Returns the whole rows in the last bytes of a log, oldest first; none where there is none."""
    file = _opened(path)
    if file is None:
        return []
    with file:
        file.seek(0, 2)
        start = max(0, file.tell() - size)
        file.seek(start)
        lines = file.read(size).split(b"\n")
    lines = lines[1 if start else 0 : -1]
    return [row for row in map(row_of, lines) if row is not None]


def _opened(path: Path) -> IO[bytes] | None:
    """Returns an open file; None where there is none to read, or a pipe that would hold us up."""
    try:
        return path.open("rb") if path.is_file() else None
    except OSError:
        return None
