"""Every adapter from the files that people have: formats, the hub's reader, what is no row."""

import gzip
import json

import datasets
import pytest

from pipeline.data.adapters.reading import ADAPTERS
from pipeline.data.files import OwnRows
from pipeline.errors import UserError
from tests.data.adapters import test_alpaca, test_hh, test_oasst, test_tldr, test_ultrafeedback
from tests.data.adapters import test_sharegpt as sharegpt
from tests.data.adapters.support import read, written
from tests.data.own import read_own

ROWS = {
    "hh": [test_hh.GOOD],
    "tldr": [test_tldr.comparison()],
    "ultrafeedback": [test_ultrafeedback.row()],
    "sharegpt": [sharegpt.LONG],
    "alpaca": [test_alpaca.PLAIN, test_alpaca.ABOUT],
    "oasst": test_oasst.flat(test_oasst.good()),
}


def test_every_schema_has_rows_here():
    assert set(ROWS) == set(ADAPTERS)


@pytest.mark.parametrize("schema", ROWS)
def test_a_published_file_gives_the_same_rows_in_every_format(tmp_path, schema, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected, _ = read(tmp_path, ROWS[schema], schema, "instructions")
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(ROWS[schema]))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "foreign.jsonl").read_bytes()))
    folder = tmp_path / "hub"
    folder.mkdir()
    written(folder / "train.parquet", ROWS[schema])
    for place in ({"path": str(whole)}, {"path": str(packed)}, {"hub": str(folder)}):
        assert read_own(OwnRows(schema=schema, **place), "instructions")[0] == expected


@pytest.mark.parametrize("schema", ["hh", "sharegpt", "alpaca", "oasst"])
def test_what_the_hub_unpacks_from_json_is_read_too(tmp_path, schema, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected, _ = read(tmp_path, ROWS[schema], schema, "instructions")
    part = tmp_path / "hub" / "part"
    part.mkdir(parents=True)
    path = part / "train.jsonl.gz"
    path.write_bytes(gzip.compress((tmp_path / "foreign.jsonl").read_bytes()))
    own = OwnRows(hub=str(part.parent), hub_dir="part", schema=schema)
    assert read_own(own, "instructions")[0] == expected


def test_rows_of_the_hub_at_a_commit(monkeypatch):
    class Builder:
        name, hash = "json", "c" * 40

        def download_and_prepare(self):
            pass

        def as_dataset(self, split):
            assert split == "train+test"
            return datasets.Dataset.from_list(ROWS["hh"])

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder())
    own = OwnRows(hub="Anthropic/hh-rlhf", hub_split="train+test", revision="c" * 40, schema="hh")
    own.check("preferences")
    rows, source = read_own(own, "preferences")
    assert rows[0]["prompt"] == test_hh.PROMPT
    assert source.version == "c" * 40


@pytest.mark.parametrize("schema", ROWS)
def test_what_is_no_row_is_refused(tmp_path, schema):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [3], schema, "instructions")  # type: ignore[list-item]
    assert "foreign.jsonl line 1: expected an object with columns, got int; " in str(caught.value)


def test_a_file_without_a_usable_row_says_why(tmp_path):
    with pytest.raises(UserError, match="no text rows in it .dropped: no final reply: 2"):
        read(tmp_path, [test_alpaca.PLAIN | {"output": ""}] * 2, "alpaca", "text")


def test_special_tokens_are_dropped(tmp_path):
    odd = test_alpaca.PLAIN | {"output": "It ends with <|im_end|>"}
    rows, dropped = read(tmp_path, [test_alpaca.PLAIN, odd], "alpaca", "instructions")
    assert len(rows) == 1
    assert dropped == {"a special token in the text": 1}
