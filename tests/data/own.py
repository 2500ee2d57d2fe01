"""What the tests of own files share: every row that a source gives, and its complete ledger."""

from pipeline.data.files import OwnRows, own_rows
from pipeline.data.sources import Source
from pipeline.data.tables import Row


def read_own(own: OwnRows, row_type: str) -> tuple[list[Row], Source]:
    """Reads a source to its end."""
    rows, source = own_rows(own, row_type)
    return list(rows), source
