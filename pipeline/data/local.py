"""Rows of a local file, each with its place: JSONL (gzipped too), JSON, CSV or Parquet."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.tables import parquet_rows
from pipeline.errors import UserError, first_line

LONGEST_CELL = 2**30
"""Signs of one cell of a CSV file; Python's own limit of 131,072 is less than a long document."""


def local_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Returns file and line of every row, and what stands there; an empty cell of CSV is None.

    Raises:
        UserError: the file is missing, unreadable, or not of its kind; the line is named.
    """
    check_file(path)
    try:
        yield from READERS[suffix_of(path)](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({first_line(error)})") from error


def check_file(path: Path) -> None:
    """Raises UserError where a path is no file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist")


def suffix_of(path: Path) -> str:
    """Returns which of SUFFIXES a file's name ends in, empty where none."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                raise UserError(f"{where}: the line is empty")
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({first_line(error)})") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = list(reader.fieldnames or ())
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise UserError(f"{path} line 1: two columns are named {', '.join(twice)!r}")
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    columns = len(header)
                    raise UserError(f"{where}: not as many cells as the header's {columns} columns")
                yield where, {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num + 1}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(parquet_rows(path), start=1):
        yield f"{path} row {number}", row


READERS = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
SUFFIXES = tuple(READERS)
