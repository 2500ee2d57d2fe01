"""Rows on their way to disk: in memory a few at a time, and the same rows in the files."""

import weakref

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data import batches
from pipeline.data.batches import batches_of, rows_where, spooled, write_batches
from pipeline.data.collection import Collection
from pipeline.data.sources import Source
from pipeline.data.tables import READ_ROWS, parquet_rows
from pipeline.errors import UserError

NUM_ROWS = 500
MOST_LIVE = 21
"""One batch, the one before it, and the row that tells the form."""


class LiveRow(dict):
    """A row that knows how many of its kind are in memory."""

    live = most = 0

    def __init__(self, number: int) -> None:
        super().__init__(text=f"text {number}", group=f"group {number}")
        LiveRow.live += 1
        LiveRow.most = max(LiveRow.most, LiveRow.live)
        weakref.finalize(self, LiveRow.forget)

    @classmethod
    def forget(cls) -> None:
        cls.live -= 1


@pytest.fixture
def few(monkeypatch):
    """Ten rows a batch; a row group ends when another batch would make it more than 100 rows."""
    LiveRow.live = LiveRow.most = 0
    monkeypatch.setattr(batches, "BATCH_ROWS", 10)
    monkeypatch.setattr(batches, "GROUP_ROWS", 100)


def made_rows():
    return (LiveRow(number) for number in range(NUM_ROWS))


def plain_rows():
    return [{"text": f"text {n}", "group": f"group {n}"} for n in range(NUM_ROWS)]


def test_rows_in_memory_do_not_grow_with_their_number(few, tmp_path):
    source = Source(origin="here", version="", sha256="", licence="")
    collected = Collection(tmp_path)
    collected.add("text", {"train": made_rows()}, source=source)
    assert LiveRow.most <= MOST_LIVE
    assert collected.counts["text"] == {"train": NUM_ROWS, "validation": 0, "test": 0}
    assert list(collected.rows("text")["train"]) == plain_rows()
    with parquet.ParquetFile(tmp_path / "text-train.parquet") as file:
        assert file.num_row_groups == 5


def test_a_row_group_ends_at_its_bytes_too(few, tmp_path, monkeypatch):
    size = next(batches_of(made_rows())).nbytes
    monkeypatch.setattr(batches, "GROUP_BYTES", 2 * size + 100)
    write_batches(tmp_path / "rows.parquet", batches_of(made_rows()))
    with parquet.ParquetFile(tmp_path / "rows.parquet") as file:
        assert file.num_row_groups == 25


def test_few_rows_make_the_file_that_one_table_makes(few, tmp_path):
    rows = [{"prompt": "p", "ids": [str(n)], "ratings": [[n]], "margin": 0.5} for n in range(90)]
    write_batches(tmp_path / "batches.parquet", batches_of(iter(rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    contents = [(tmp_path / f"{name}.parquet").read_bytes() for name in ("batches", "table")]
    assert contents[0] == contents[1]


def test_columns_that_begin_empty_have_their_type(few, tmp_path):
    rows = [{"margin": None, "ratings": [[]]} for _ in range(10)]
    rows += [{"margin": 1.5, "ratings": [[3]]}]
    path = tmp_path / "rows.parquet"
    assert write_batches(path, batches_of(iter(rows))) == 11
    assert list(parquet_rows(path)) == rows


def test_no_rows_leave_no_file(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("rows of before")
    assert write_batches(path, batches_of(iter(()))) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_from_its_own_rows(few, tmp_path):
    path = tmp_path / "rows.parquet"
    write_batches(path, batches_of(made_rows()))
    write_batches(path, batches_of(row for row in parquet_rows(path) if row["text"] > "text 3"))
    expected = [row for row in plain_rows() if row["text"] > "text 3"]
    assert list(parquet_rows(path)) == expected
    assert list(tmp_path.iterdir()) == [path]


def test_a_spool_gives_its_rows_again_and_those_that_are_chosen(few, tmp_path):
    chosen = np.arange(NUM_ROWS) % 7 == 3
    with spooled(batches_of(made_rows()), tmp_path) as spool:
        assert LiveRow.most <= MOST_LIVE
        assert list(tmp_path.iterdir()) == []
        for mask in (chosen, ~chosen):
            given = [row for batch in rows_where(spool, mask) for row in batch.to_pylist()]
            assert given == [row for row, kept in zip(plain_rows(), mask, strict=True) if kept]


def test_rows_are_read_before_the_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([{"text": f"{n} {n * n}"} for n in range(2 * READ_ROWS)])
    parquet.write_table(table, path, row_group_size=READ_ROWS, compression="none")
    with parquet.ParquetFile(path) as file:
        second = file.metadata.row_group(1).column(0)
        start = second.dictionary_page_offset or second.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    rows = parquet_rows(path)
    assert [next(rows)["text"] for _ in range(3)] == ["0 0", "1 1", "2 4"]
    with pytest.raises(UserError, match="is not a Parquet file that can be read"):
        list(rows)
