"""What tests of rows share: all that a source gives, and files as the data stage writes them."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.batches import batches_of, write_batches
from pipeline.data.files import OwnRows, own_rows
from pipeline.data.formats import rows_file
from pipeline.data.sources import Source
from pipeline.data.tables import Row


def read_own(own: OwnRows, row_type: str) -> tuple[list[Row], Source]:
    """Reads a source to its end."""
    rows, source = own_rows(own, row_type)
    return list(rows), source


def write_rows(folder: Path, row_type: str, *, split: str, rows: Iterable[Row]) -> None:
    """Writes rows as the data stage does."""
    write_batches(rows_file(folder, row_type, split=split), batches_of(rows))
