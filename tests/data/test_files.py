"""The user's own files: three formats, the hub, and every mistake with file and line."""

import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data.files import OwnRows, own_rows
from pipeline.errors import UserError

PAIRS = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]


def rows_of(path, row_type="instructions"):
    return own_rows(OwnRows(path=str(path)), row_type)


def text_file(tmp_path, content: str, name: str = "own.jsonl"):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_three_formats_give_the_same_rows(tmp_path):
    lines = text_file(tmp_path, "".join(json.dumps(row) + "\n" for row in PAIRS))
    cells = text_file(tmp_path, "\ufeffprompt,completion\np,c\nq,d\n", "own.csv")
    table = tmp_path / "own.parquet"
    parquet.write_table(pa.Table.from_pylist(PAIRS), table)
    rows, source = rows_of(lines)
    assert [(row["prompt"], row["completion"]) for row in rows] == [("p", "c"), ("q", "d")]
    assert rows == rows_of(cells)[0] == rows_of(table)[0]
    assert source.origin == lines.name
    assert len(source.sha256) == 64


def test_special_tokens_are_dropped_and_counted(tmp_path):
    rows, source = rows_of(text_file(tmp_path, '{"text": "a"}\n{"text": "<|end|>"}\n'), "text")
    assert len(rows) == 1
    assert source.dropped == {"a special token in the text": 1}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"text": "a"}\nnot json\n', "own.jsonl", "own.jsonl line 2: not JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n', "own.jsonl", "own.jsonl line 2: the line is empty"),
        ('{"text": "a"}\n{"text": " "}\n', "own.jsonl", "own.jsonl line 2: text is empty"),
        ('{"text": "a"}\n3\n', "own.jsonl", "own.jsonl line 2: expected an object"),
        ("", "own.jsonl", "own.jsonl: no text rows in it"),
        ("text,b\na,b\nc\n", "own.csv", "own.csv line 3: not as many cells as the header's 2"),
        ("text,b\na,b,c\n", "own.csv", "own.csv line 2: not as many cells as the header's 2"),
        ("text,b\n,b\n", "own.csv", "own.csv line 2: text is missing"),
        ('text\n"a" b\n', "own.csv", "own.csv line 2: not CSV"),
        ("text\n", "own.csv", "own.csv: no text rows in it"),
        ("PAR1", "own.parquet", "own.parquet is not a Parquet file"),
    ],
)
def test_malformed_files(tmp_path, content, name, message):
    with pytest.raises(UserError) as caught:
        rows_of(text_file(tmp_path, content, name), "text")
    assert message in str(caught.value)


def test_rows_of_two_forms_are_refused(tmp_path):
    mixed = [PAIRS[0], {"prompt": [{"role": "user", "content": "q"}], "completion": "d"}]
    path = text_file(tmp_path, "".join(json.dumps(row) + "\n" for row in mixed))
    with pytest.raises(UserError, match="line 2: prompt differ in form from the first row's"):
        rows_of(path)


def test_margins_may_have_gaps(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = text_file(tmp_path, f"{json.dumps(pair)}\n{json.dumps(pair | {'margin': 1})}\n")
    assert [row["margin"] for row in rows_of(path, "preferences")[0]] == [None, 1.0]


def test_not_utf8(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"own\.jsonl is not UTF-8 text"):
        rows_of(path, "text")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        rows_of(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "rows.txt"}, r"text\.path: must end in .jsonl, .csv, .parquet, got 'rows.txt'"),
        (
            {"path": "rows.csv", "hub": "a/b"},
            r"text\.path: name a file or a hub data set, not both",
        ),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        OwnRows(**settings).check("text")


class Builder:
    """Stands for datasets' builder of a data set on the hub."""

    name = "parquet"

    def download_and_prepare(self):
        pass

    def as_dataset(self, split):
        assert split == "train"
        return datasets.Dataset.from_list(PAIRS)


def test_hub_data_set(monkeypatch):
    asked: dict[str, object] = {}

    def load_dataset_builder(name, config, **settings):
        asked.update(settings, name=name, config=config)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    rows, source = own_rows(OwnRows(hub="owner/name", revision="abc"), "instructions")
    assert [row["prompt"] for row in rows] == ["p", "q"]
    assert asked == {"name": "owner/name", "config": None, "revision": "abc"}
    assert (source.origin, source.version) == ("hub: owner/name", "abc")


def test_hub_data_set_that_is_not_there(monkeypatch):
    def load_dataset_builder(*_, **__):
        raise FileNotFoundError("it does not exist\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError, match="cannot load the hub data set a/b") as caught:
        own_rows(OwnRows(hub="a/b"), "text")
    assert str(caught.value).endswith("(it does not exist)")
