"""Rows on their way to disk: Arrow batches, so that memory does not grow with their number."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.data.tables import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH_ROWS = 4096
"""Rows that are Python objects at one time."""
GROUP_ROWS = 2**20
GROUP_BYTES = 2**26
"""What a row group of a Parquet file holds at most; it is in memory until it is whole."""

Batch = Any
"""A `pyarrow.RecordBatch`, which is untyped here."""


def batches_of(rows: Iterable[Row]) -> Iterator[Batch]:
    """Returns rows as Arrow batches of one schema, which the first row tells.

    Columns that may be empty in the first row, or in all, have their type by name.
    """
    import pyarrow as pa

    declared = {"margin": pa.float64(), "ratings": pa.list_(pa.list_(pa.int64()))}
    rows = iter(rows)
    for first in islice(rows, 1):
        inferred = pa.RecordBatch.from_pylist([first]).schema
        schema = pa.schema([f.with_type(declared.get(f.name, f.type)) for f in inferred])
        rows = chain([first], rows)
        while some := list(islice(rows, BATCH_ROWS)):
            yield pa.RecordBatch.from_pylist(some, schema=schema)


def write_batches(path: Path, batches: Iterable[Batch]) -> int:
    """Writes a Parquet file, a row group at a time; returns its rows. Without any there is no file.

    The file takes its name when it is whole, so batches may come from the file of that name.
    """
    from pyarrow import parquet

    temporary, num_rows, writer = path.with_name(f".{path.name}.tmp"), 0, None
    for table in _row_groups(batches):
        writer = writer or parquet.ParquetWriter(temporary, table.schema)
        writer.write_table(table)
        num_rows += len(table)
    if writer is None:
        path.unlink(missing_ok=True)
    else:
        writer.close()
        temporary.replace(path)
    return num_rows


def _row_groups(batches: Iterable[Batch]) -> Iterator[Any]:
    import pyarrow as pa

    def table() -> Any:
        return pa.Table.from_batches(waiting).combine_chunks()

    waiting: list[Batch] = []
    rows = size = 0
    for batch in batches:
        if waiting and (rows + len(batch) > GROUP_ROWS or size + batch.nbytes > GROUP_BYTES):
            yield table()
            waiting, rows, size = [], 0, 0
        waiting.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
    if rows:
        yield table()


def rows_where(batches: Iterable[Batch], chosen: "NDArray[np.bool_]") -> Iterator[Batch]:
    """Returns the chosen rows: True for a row that is kept, over all batches."""
    import pyarrow as pa

    start = 0
    for batch in batches:
        yield batch.filter(pa.array(chosen[start : start + len(batch)]))
        start += len(batch)


@dataclass(frozen=True)
class Spool:
    """Batches that wait in a file and are read as often as they are asked for."""

    file: IO[bytes]

    def __iter__(self) -> Iterator[Batch]:
        import pyarrow as pa

        self.file.seek(0)
        yield from pa.ipc.open_stream(self.file)


@contextlib.contextmanager
def spooled(batches: Iterable[Batch], folder: Path) -> Iterator[Spool]:
    """Yields the batches, at least one, out of a file without a name, gone with the process."""
    import pyarrow as pa

    with tempfile.TemporaryFile(dir=folder) as file:
        writer = None
        for batch in batches:
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        assert writer is not None, "nothing to spool"
        writer.close()
        yield Spool(file)
