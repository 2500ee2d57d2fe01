"""The user's own rows: a local JSONL, CSV or Parquet file, or a data set from the hub."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import portable, require
from pipeline.data.cleaning import has_marker
from pipeline.data.formats import check_row, row_texts
from pipeline.data.sources import Source
from pipeline.data.splits import Split
from pipeline.data.tables import Row, parquet_rows
from pipeline.errors import UserError, first_line

SUFFIXES = (".jsonl", ".csv", ".parquet")
LONGEST_CELL = 2**30
"""Signs of one cell of a CSV file; Python's own limit of 131,072 is less than a long document."""
HUB_FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Formats of a hub data set that hold text alone, by the names of datasets' builders."""


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """Rows of your own in place of the recipe's, for one row type."""

    path: str = ""
    """Local file: .jsonl (one object per line), .csv (a header line) or .parquet."""
    hub: str = ""
    """Hub data set as datasets.load_dataset names it, such as owner/name."""
    hub_config: str = ""
    """Configuration of the hub data set; its default one when empty."""
    hub_split: str = "train"
    """Split of the hub data set that is read; ours are made from it."""
    revision: str = "main"
    """Revision of the hub data set: a commit pins it."""
    licence: str = "unknown"
    """Licence of these rows, for sources.json and the model cards."""
    split: Split = field(default_factory=Split)
    """Shares held out; rows with one `group` column (else the same first text) stay together."""

    def check(self, field: str) -> None:
        """Raises UserError, naming the field's path, for settings that do not fit together."""
        self.split.check(f"{field}.split")
        require(
            not (self.path and self.hub),
            f"{field}.path: name a file or a hub data set, not both",
        )
        require(
            not self.path or Path(self.path).suffix in SUFFIXES,
            f"{field}.path: must end in {', '.join(SUFFIXES)}, got {self.path!r}",
        )

    @property
    def is_given(self) -> bool:
        """Whether the user brought rows."""
        return bool(self.path or self.hub)


def own_rows(own: OwnRows, row_type: str) -> tuple[list[Row], Source]:
    """Returns the checked rows and their ledger; texts that spell a special token are dropped.

    Raises:
        UserError: the file is missing, unreadable or empty, or a row is malformed: the message
            names file and line.
    """
    raw = _local_rows(Path(own.path)) if own.path else _hub_rows(own)
    source = Source(
        origin=portable(own.path) or f"hub: {own.hub} {own.hub_config}".strip(),
        version="" if own.path else own.revision,
        sha256=file_digest(own),
        licence=own.licence,
    )
    rows: list[Row] = []
    first: Row | None = None
    for where, value in raw:
        row = check_row(value, row_type, where=where)
        first = first or row
        _check_alike(row, first, where=where)
        if any(has_marker(text) for text in row_texts(row)):
            source.dropped["a special token in the text"] += 1
        else:
            rows.append(row)
    if not rows:
        dropped = sum(source.dropped.values())
        why = f" ({dropped} were dropped: a special token in the text)" if dropped else ""
        raise UserError(f"{own.path or source.origin}: no {row_type} rows in it{why}")
    return rows, source


def file_digest(own: OwnRows) -> str:
    """Returns the SHA-256 of the local file, or nothing for a hub data set."""
    if not own.path:
        return ""
    if not Path(own.path).is_file():
        raise UserError(f"{own.path} does not exist")
    with Path(own.path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                raise UserError(f"{where}: the line is empty")
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({first_line(error)})") from error


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
                # An empty cell is an absent value, so that an optional column may have gaps.
                yield where, {name: cell for name, cell in row.items() if cell}
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num + 1}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(parquet_rows(path), start=1):
        yield f"{path} row {number}", row


def _hub_rows(own: OwnRows) -> Iterator[tuple[str, Any]]:
    import datasets
    import yaml
    from datasets.exceptions import DatasetsError

    try:
        builder = datasets.load_dataset_builder(
            own.hub, own.hub_config or None, revision=own.revision
        )
        _check_format(builder.name, own.hub)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=own.hub_split)
    except (OSError, ValueError, RuntimeError, DatasetsError, yaml.YAMLError) as error:
        # Not found, no network, no such configuration or split, a loading script, a broken file.
        reason = first_line(error)
        raise UserError(f"cannot load the hub data set {own.hub} ({reason})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{own.hub} row {number}", row


def _check_format(name: str, hub: str) -> None:
    """Refuses files that are not rows of text: some of their kinds hold pickles."""
    require(
        name in HUB_FORMATS,
        f"the hub data set {hub} is made of {name} files; only {', '.join(HUB_FORMATS)} are read",
    )


def _check_alike(row: Row, first: Row, *, where: str) -> None:
    """Refuses a row whose columns have other types than the first row's."""
    if "chosen" in row:
        row.setdefault("margin", None)
    expected = {name: type(value) for name, value in first.items() if name != "margin"}
    given = {name: type(value) for name, value in row.items() if name != "margin"}
    if given != expected:
        names = sorted(k for k in given.keys() | expected.keys() if given.get(k) != expected.get(k))
        raise UserError(f"{where}: {', '.join(names)} differ in form from the first row's")
