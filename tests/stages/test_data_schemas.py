"""The data stage on foreign files: whole documents in one split, every drop in the ledger."""

from typing import Any

import pytest

from pipeline.checkpoint import open_artifact
from pipeline.data.adapters.reading import ADAPTERS
from pipeline.data.files import OwnRows
from pipeline.data.formats import read_rows
from pipeline.data.splits import SPLITS
from pipeline.storage import read_json
from stages.data import Chats, Config, Ratings, main, run
from tests.data.adapters import foreign
from tests.data.adapters.support import written

NOTHING: dict[str, Any] = {"chats": Chats(source="none"), "ratings": Ratings(source="none")}
DROPPED = {
    "hh": "chosen and rejected are the same text",
    "tldr": "chosen and rejected are the same text",
    "ultrafeedback": "chosen and rejected are the same text",
    "sharegpt": "an empty turn",
    "alpaca": "no final reply",
    "oasst": "messages: deleted",
}
"""Why each of the files loses a row."""


@pytest.fixture(params=list(ADAPTERS))
def made(request, tmp_path):
    """The data folder of a run whose every row type comes from one foreign file."""
    schema = request.param
    path = written(tmp_path / "foreign.jsonl", foreign.documents(schema, count=40, seed=1))
    gives = [name for name in ADAPTERS[schema].gives if name != "guard_preferences"]
    own = {name: OwnRows(path=str(path), schema=schema, licence="CC0-1.0") for name in gives}
    run(Config(recipe="smoke", run=str(tmp_path / "run"), tracking="none", **NOTHING, **own))
    return schema, gives, open_artifact(tmp_path / "run" / "data", kind="dataset")


def test_every_row_type_of_every_schema(made):
    schema, gives, artifact = made
    rows = artifact.summary["rows"]
    assert set(rows) == set(gives)
    assert all(rows[name][split] > 0 for name in gives for split in SPLITS)
    ledger = read_json(artifact.path / "sources.json")
    assert len(ledger) == len(gives)
    assert {entry["licence"] for entry in ledger} == {"CC0-1.0"}
    assert sum(entry["dropped"].get(DROPPED[schema], 0) for entry in ledger) > 0


def test_a_document_is_in_one_split_whatever_is_made_of_it(made):
    _, gives, artifact = made
    split_of: dict[str, str] = {}
    rows_of_a_document: dict[str, int] = {}
    for row_type in gives:
        for split in SPLITS:
            for row in read_rows(artifact.path, row_type, split=split):
                assert split_of.setdefault(row["group"], split) == split
                rows_of_a_document[row["group"]] = rows_of_a_document.get(row["group"], 0) + 1
    assert set(split_of.values()) == set(SPLITS)
    assert max(rows_of_a_document.values()) >= len(gives)


def test_prompts_have_several_turns(made):
    schema, _, artifact = made
    prompts = [row["prompt"] for row in read_rows(artifact.path, "prompts", split="train")]
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    longest = max(map(len, prompts))
    assert longest >= 3 if schema in ("hh", "sharegpt", "oasst") else longest == 1


def test_settings_of_a_recipe_name_the_schema(tmp_path):
    path = written(tmp_path / "foreign.jsonl", foreign.documents("hh", count=20, seed=2))
    words = [
        "--recipe=smoke",
        f"--run={tmp_path / 'run'}",
        "--tracking=none",
        "--chats.source=none",
    ]
    words += ["--ratings.source=none", f"--preferences.path={path}", "--preferences.schema=hh"]
    assert main(words) == 0
    config = open_artifact(tmp_path / "run" / "data", kind="dataset").content["config"]
    assert config["preferences"]["schema"] == "hh"


def test_a_file_of_another_schema_leaves_nothing_behind(tmp_path, caplog):
    path = written(tmp_path / "foreign.jsonl", foreign.documents("alpaca", count=4, seed=1))
    words = ["--recipe=smoke", f"--run={tmp_path / 'run'}", "--tracking=none"]
    assert main([*words, f"--preferences.path={path}", "--preferences.schema=hh"]) == 2
    assert "foreign.jsonl line 1: chosen is missing; hh needs chosen and rejected" in caplog.text
    assert not (tmp_path / "run/data").exists()
