"""What the tests of adapters share: foreign rows in a file, read as the data stage reads them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from pipeline.data.files import OwnRows
from pipeline.data.tables import Row
from tests.data.own import read_own


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSONL or Parquet."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    schema: str,
    row_type: str,
    *,
    name: str = "foreign.jsonl",
    languages: tuple[str, ...] = (),
) -> tuple[list[Row], dict[str, int]]:
    """Returns the rows of one type that a file of foreign rows gives, and what was dropped."""
    path = written(folder / name, rows)
    own = OwnRows(path=str(path), schema=schema, languages=languages)
    own.check(row_type)
    made, source = read_own(own, row_type)
    return made, {reason: count for reason, count in source.dropped.items() if count}


def user(content: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}
