"""JSONL, CSV and Parquet files cut, filled, mixed and misnamed: rows come of them, or one line."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data.files import SUFFIXES, OwnRows
from pipeline.data.formats import read_rows
from tests.data.own import read_own, write_rows
from tests.fuzz.support import as_json, damaged, damaged_bytes, fuzz, one_line, texts, values
from tests.fuzz.test_rows import GOOD_ROWS

PAIRS = [{"prompt": "hi", "completion": "hello"}, {"prompt": "how?", "completion": "so\nso"}]
FRAMES = (
    b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\r\n", b"\n\n", b"\"", b"\xed\xa0\x80", b"\x1f\x8b",
)  # fmt: skip
"""What a file may begin or end with: byte-order marks, NUL, empty lines, a quote, a surrogate."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def as_csv(rows: list[dict[str, str]], newline: str = "\n") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_jsonl(rows) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def read(folder, name: str, content: bytes, row_type: str = "instructions") -> None:
    """Reads the file as the data stage does; what it gives can be written and read back."""
    path = folder / name
    path.write_bytes(content)
    given = one_line(lambda: read_own(OwnRows(path=str(path)), row_type))
    if given is not None:
        rows, source = given
        json.dumps(source.as_json(), ensure_ascii=False).encode()
        write_rows(folder, row_type, split="train", rows=rows)
        assert read_rows(folder, row_type, split="train") == rows


WHOLE = {
    ".jsonl": as_jsonl(PAIRS),
    ".csv": as_csv(PAIRS, "\r\n"),
    ".parquet": as_parquet(PAIRS),
    ".json": as_json(PAIRS),
    ".jsonl.gz": gzip.compress(as_jsonl(PAIRS)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@fuzz(30)
@given(data=st.data())
def test_a_damaged_file_gives_rows_or_one_line(suffix, folder, data):
    content = data.draw(damaged_bytes(WHOLE[suffix]))
    before, after = (data.draw(st.sampled_from(FRAMES)) for _ in range(2))
    read(folder, f"own{suffix}", before + content + after)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("other", [".jsonl", ".csv", ".parquet", ".gz", ".empty"])
def test_a_misnamed_compressed_or_empty_file_gives_rows_or_one_line(suffix, other, folder):
    contents = {**WHOLE, ".gz": WHOLE[".jsonl.gz"], ".empty": b""}
    read(folder, f"other{suffix}", contents[other])


@pytest.mark.parametrize("row_type", GOOD_ROWS)
@fuzz(20)
@given(data=st.data())
def test_lines_of_mixed_rows_give_rows_or_one_line(row_type, folder, data):
    rows = st.sampled_from(GOOD_ROWS[row_type])
    chosen = data.draw(st.lists(rows | rows.flatmap(damaged), min_size=1, max_size=4))
    read(folder, "mixed.jsonl", as_jsonl(chosen), row_type)


@fuzz(30)
@given(
    header=st.lists(st.sampled_from(("prompt", "completion", "group", "", "margin")) | texts),
    cells=st.lists(st.lists(texts, max_size=4), max_size=3),
    newline=st.sampled_from(("\n", "\r\n", "\r")),
)
def test_any_table_of_cells_gives_rows_or_one_line(folder, header, cells, newline):
    file = io.StringIO()
    csv.writer(file, lineterminator=newline).writerows([header, *cells])
    read(folder, "cells.csv", file.getvalue().encode("utf-8", "surrogatepass"))


@fuzz(30)
@given(data=st.data())
def test_columns_of_any_type_give_rows_or_one_line(folder, data):
    columns = data.draw(
        st.dictionaries(
            st.sampled_from(("prompt", "completion", "messages", "group", "text")),
            column(),
            min_size=1,
        )
    )
    rows = data.draw(st.integers(0, 3))
    table = pa.table({name: made[:rows] for name, made in columns.items()})
    file = io.BytesIO()
    parquet.write_table(table, file)
    read(folder, "columns.parquet", file.getvalue(), data.draw(st.sampled_from(list(GOOD_ROWS))))


@st.composite
def column(draw: st.DrawFn) -> pa.Array:
    """Three cells of one of Arrow's types."""
    kinds = {
        pa.string(): ["hi", None, "so"],
        pa.large_string(): ["hi", "\U0001f600", "so"],
        pa.binary(): [b"hi", b"\xff", None],
        pa.float64(): [1.0, float("nan"), None],
        pa.float16(): [1.0, float("inf"), None],
        pa.int64(): [2**62, -1, None],
        pa.uint64(): [2**64 - 1, 0, None],
        pa.bool_(): [True, None, False],
        pa.null(): [None, None, None],
        pa.timestamp("ns"): [1, 2**62, None],
        pa.timestamp("s", "Nowhere/City"): [1, 2**40, None],
        pa.timestamp("s"): [1, 2**52, None],
        pa.date32(): [2**30, 1, None],
        pa.duration("ns"): [1, 2**62, None],
        pa.time64("ns"): [1, 2, None],
        pa.decimal128(38, 2): [1, None, 2],
        pa.list_(pa.string()): [["hi"], [], None],
        pa.dictionary(pa.int8(), pa.string()): ["hi", "so", None],
        pa.struct([("role", pa.string()), ("content", pa.string())]): [
            {"role": "user", "content": "hi"}, None, {"role": None, "content": "x"},
        ],
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])): [
            [{"role": "user", "content": "hi"}], None, [],
        ],
        pa.map_(pa.string(), pa.int8()): [[("a", 1), ("a", 2)], [], None],
    }  # fmt: skip
    kind = draw(st.sampled_from(list(kinds)))
    return pa.array(kinds[kind], kind)


@fuzz(30)
@given(rows=st.lists(values, max_size=3))
def test_lines_of_any_json_give_rows_or_one_line(folder, rows):
    read(folder, "any.jsonl", as_jsonl(rows), "text")
