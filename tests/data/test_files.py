"""The user's own files: three formats, the hub, and every mistake with file and line."""

import gzip
import inspect
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data.files import OwnRows, file_digest
from pipeline.errors import UserError
from tests.data.own import read_own

PAIRS = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]


def rows_of(path, row_type="instructions"):
    return read_own(OwnRows(path=str(path)), row_type)


def text_file(tmp_path, content: str, name: str = "own.jsonl"):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_every_format_gives_the_same_rows(tmp_path):
    lines = text_file(tmp_path, "".join(json.dumps(row) + "\n" for row in PAIRS))
    cells = text_file(tmp_path, "\ufeffprompt,completion\np,c\nq,d\n", "own.csv")
    table = tmp_path / "own.parquet"
    parquet.write_table(pa.Table.from_pylist(PAIRS), table)
    rows, source = rows_of(lines)
    assert [(row["prompt"], row["completion"]) for row in rows] == [("p", "c"), ("q", "d")]
    assert rows == rows_of(cells)[0] == rows_of(table)[0]
    array = text_file(tmp_path, json.dumps(PAIRS), "own.json")
    packed = tmp_path / "own.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert rows == rows_of(array)[0] == rows_of(packed)[0]
    assert source.origin == lines.name
    assert len(source.sha256) == 64


def test_special_tokens_are_dropped_and_counted(tmp_path):
    lines = '{"text": "a <| b"}\n{"text": "<|end|>"}\n{"text": "it ends with <|eot_id|>"}\n'
    rows, source = rows_of(text_file(tmp_path, lines), "text")
    assert len(rows) == 1
    assert source.dropped == {"a special token in the text": 2}
    with pytest.raises(UserError, match="no text rows in it .dropped: a special token in the text"):
        rows_of(text_file(tmp_path, '{"text": "<|end|>"}\n'), "text")


def test_lines_and_spaces_stay(tmp_path):
    text = "\n\tdef f():\r\n    return 1\0\n"
    (row,) = rows_of(text_file(tmp_path, json.dumps({"text": text}) + "\n"), "text")[0]
    assert row["text"] == "def f():\n    return 1"


def test_a_cut_gzip_file(tmp_path):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])
    with pytest.raises(UserError, match=r"own\.jsonl\.gz is not a whole gzip file"):
        rows_of(path, "text")


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
        ('{"text": "a"}', "own.json", "own.json: expected a list of rows, got dict"),
        ('["a"]', "own.json", "own.json row 1: expected an object"),
        ('[{"text": "a"}', "own.json", "own.json: not JSON"),
        ('{"text": "a"}', "own.jsonl.gz", "own.jsonl.gz is not a whole gzip file"),
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
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"rows\.jsonl is a folder; name a file in it"):
        rows_of(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "rows.txt"}, r"text\.path: must end in .jsonl, .*, .parquet, got 'rows.txt'"),
        (
            {"path": "rows.csv", "hub": "a/b"},
            r"text\.path: name a file or a hub data set, not both",
        ),
        ({"hub": "a/b"}, r"text\.revision: name the commit of a/b that is read"),
        ({"schema": "reddit"}, r"text\.schema: must be hh, tldr, .* or empty, got 'reddit'"),
        ({"languages": ("en",)}, r"text\.languages: the rows do not tell their language"),
        ({"schema": "hh", "languages": ("en",)}, r"text\.languages: the rows do not tell"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        OwnRows(**settings).check("text")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Builder:
    """Stands for datasets' builder of a data set on the hub."""

    name = "parquet"
    hash = COMMIT

    def download_and_prepare(self):
        pass

    def as_dataset(self, split):
        assert split == "train"
        return datasets.Dataset.from_list(PAIRS)


@pytest.fixture
def asked(monkeypatch) -> dict[str, object]:
    """What the hub was asked for; it gives the pairs."""
    settings_of: dict[str, object] = {}

    def load_dataset_builder(name, config, **settings):
        settings_of.update(settings, name=name, config=config)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return settings_of


def test_hub_data_set(asked):
    rows, source = read_own(OwnRows(hub="owner/name", revision="main"), "instructions")
    assert [row["prompt"] for row in rows] == ["p", "q"]
    assert asked == {"name": "owner/name", "config": None, "data_dir": None, "revision": "main"}
    assert (source.origin, source.version) == ("hub: owner/name train", COMMIT)


def test_part_of_a_hub_data_set_at_a_commit(asked):
    own = OwnRows(hub="owner/name", hub_config="c", hub_dir="part", revision=COMMIT)
    own.check("instructions")
    _, source = read_own(own, "instructions")
    assert asked == {"name": "owner/name", "config": "c", "data_dir": "part", "revision": COMMIT}
    assert (source.origin, source.version) == ("hub: owner/name c part train", COMMIT)


def test_another_commit_than_the_one_asked_for(asked):
    with pytest.raises(UserError, match=f"owner/name was found at {COMMIT}, not at the revision f"):
        read_own(OwnRows(hub="owner/name", revision="f" * 40), "instructions")


def test_the_settings_are_those_of_the_installed_datasets():
    parameters = inspect.signature(datasets.load_dataset_builder).parameters
    assert list(parameters)[:2] == ["path", "name"]
    assert {"data_dir", "revision"} <= set(parameters)


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_a_folder_is_read_as_the_hub_is(tmp_path, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    (folder / "part").mkdir(parents=True)
    datasets.Dataset.from_list(PAIRS).to_csv(folder / "other.csv")
    table = datasets.Dataset.from_list(PAIRS[:1])
    write = {".jsonl": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv}
    write[Path(name).suffix](folder / "part" / name)
    own = OwnRows(hub=str(folder), hub_dir="part")
    own.check("instructions")
    rows, source = read_own(own, "instructions")
    assert [row["completion"] for row in rows] == ["c"]
    assert (source.origin, source.version) == ("hub: rows part train", "")
    assert len(source.sha256) == 64
    (folder / "other.csv").write_text("edited")
    assert file_digest(own) != source.sha256


def test_hub_data_set_that_is_not_there(monkeypatch):
    def load_dataset_builder(*_, **__):
        raise FileNotFoundError("it does not exist\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError, match="cannot load the hub data set a/b") as caught:
        read_own(OwnRows(hub="a/b"), "text")
    assert str(caught.value).endswith("(it does not exist)")
