"""The data stage: the real run() on made-up rows, on own files, and on mistakes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import open_artifact
from pipeline.config import ROOM
from pipeline.data.cleaning import normalise
from pipeline.data.files import OwnRows
from pipeline.data.formats import read_rows, row_texts
from pipeline.data.splits import SPLITS, Split
from pipeline.errors import UpToDate, UserError
from pipeline.storage import read_json
from stages.data import Chats, Config, Ratings, main, run

CHATS = Chats(source="synthetic", synthetic_conversations=60)
RATINGS = Ratings(source="synthetic", synthetic_texts=40, ranking_size=8)


def config_of(tmp_path: Path, **settings) -> Config:
    made: dict[str, Any] = {"chats": CHATS, "ratings": RATINGS} | settings
    return Config(recipe="smoke", run=str(tmp_path / "run"), tracking="none", **made)


def texts_of(folder: Path, row_type: str, split: str) -> set[str]:
    rows = read_rows(folder, row_type, split=split)
    return {normalise(text) for row in rows for text in row_texts(row)}


def test_made_up_rows_of_every_type(tmp_path):
    run(config_of(tmp_path))
    artifact = open_artifact(tmp_path / "run/data", kind="dataset")
    for row_type in Config().own:
        for split in SPLITS:
            rows = read_rows(artifact.path, row_type, split=split)
            assert len(rows) == artifact.summary["rows"][row_type][split] > 0
    chats, ratings = read_json(artifact.path / "sources.json")
    assert chats["rows"]["text"] == artifact.summary["rows"]["text"]
    assert ratings["licence"] == "Apache-2.0"
    assert chats["dropped"]["conversations: fewer than 2 turns"] > 0
    metrics = json.loads((artifact.path / "metrics.jsonl").read_text())
    assert metrics["text/train_rows"] == artifact.summary["rows"]["text"]["train"]


def test_nothing_leaks_between_splits(tmp_path):
    run(config_of(tmp_path))
    folder = tmp_path / "run/data"
    groups = [{row["group"] for row in read_rows(folder, "text", split=s)} for s in SPLITS]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    seen = texts_of(folder, "text", "train") | texts_of(folder, "text", "validation")
    assert not texts_of(folder, "prompts", "test") & seen
    responses = [
        {
            normalise(text)
            for row in read_rows(folder, "preferences", split=split)
            for text in row["responses"]
        }
        for split in SPLITS
    ]
    assert not responses[0] & responses[1]
    assert not (responses[0] | responses[1]) & responses[2]
    training_prompts = {row["prompt"] for row in read_rows(folder, "prompts", split="train")}
    for split in SPLITS:
        for row in read_rows(folder, "preferences", split=split):
            assert set(row["prompts"]) <= training_prompts


def test_same_content_is_the_same_artifact(tmp_path):
    run(config_of(tmp_path / "one"))
    run(config_of(tmp_path / "two"))
    one, two = (open_artifact(tmp_path / n / "run/data", kind="dataset") for n in ("one", "two"))
    assert one.digest == two.digest
    with pytest.raises(UpToDate):
        run(config_of(tmp_path / "one"))


def test_context_makes_prompts_of_messages(tmp_path):
    chats = Chats(source="synthetic", synthetic_conversations=60, context_turns=3)
    run(config_of(tmp_path, chats=chats))
    rows = read_rows(tmp_path / "run/data", "instructions", split="train")
    assert {len(row["prompt"]) for row in rows} == {1, 2, 3}
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    prompts = read_rows(tmp_path / "run/data", "prompts", split="test")
    assert all(row["prompt"][-1]["role"] == "user" for row in prompts)


def own_file(tmp_path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return str(path)


def test_own_rows_replace_the_recipes(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(30)]
    own = OwnRows(path=own_file(tmp_path, rows), licence="CC0")
    chats = Chats(source="synthetic", synthetic_conversations=60, min_words=8)
    run(config_of(tmp_path, instructions=own, chats=chats))
    artifact = open_artifact(tmp_path / "run/data", kind="dataset")
    assert artifact.summary["rows"]["instructions"] == {"train": 24, "validation": 3, "test": 3}
    assert artifact.summary["rows"]["prompts"]["train"] == 24
    # The chats still give the text, and do not claim the rows they did not give.
    theirs, made_up, _ = read_json(artifact.path / "sources.json")
    assert theirs["licence"] == "CC0"
    assert set(made_up["rows"]) == {"text"}
    assert not any(reason.startswith("instructions") for reason in made_up["dropped"])


def test_an_edited_file_makes_other_data(tmp_path):
    own = OwnRows(path=own_file(tmp_path, [{"text": f"text {n}"} for n in range(10)]))
    run(config_of(tmp_path, text=own))
    first = open_artifact(tmp_path / "run/data", kind="dataset").digest
    own_file(tmp_path, [{"text": f"edited {n}"} for n in range(10)])
    run(config_of(tmp_path, text=own))
    assert open_artifact(tmp_path / "run/data", kind="dataset").digest != first


def test_own_rows_alone(tmp_path):
    own = OwnRows(path=own_file(tmp_path, [{"text": f"text {n}"} for n in range(10)]))
    nothing: dict[str, Any] = {"chats": Chats(source="none"), "ratings": Ratings(source="none")}
    config = config_of(tmp_path, text=own, **nothing)
    assert config.room == ROOM + 2 * Path(own.path).stat().st_size
    run(config)
    assert set(open_artifact(tmp_path / "run/data", kind="dataset").summary["rows"]) == {"text"}
    with pytest.raises(UserError, match="every source is none"):
        run(config_of(tmp_path / "empty", **nothing))
    with pytest.raises(UserError, match="rankings need prompts"):
        run(config_of(tmp_path / "no-prompts", text=own, chats=Chats(source="none")))


def test_a_question_whose_pairs_train_is_no_test_prompt(tmp_path):
    # The two files name their documents in different ways, so splits by document do not meet.
    questions = [f"What is number {n}?" for n in range(60)]
    pairs = [
        {"prompt": question.lower(), "chosen": "a", "rejected": "b", "group": f"pair {number}"}
        for number, question in enumerate(questions)
    ]
    files = {"prompts": [{"prompt": question} for question in questions], "preferences": pairs}
    own = {}
    for row_type, rows in files.items():
        (tmp_path / row_type).mkdir()
        split = Split(validation_frac=0.2, test_frac=0.3)
        own[row_type] = OwnRows(path=own_file(tmp_path / row_type, rows), split=split)
    run(config_of(tmp_path, **own, chats=Chats(source="none"), ratings=Ratings(source="none")))
    folder = tmp_path / "run" / "data"
    learned = texts_of(folder, "preferences", "train") | texts_of(
        folder, "preferences", "validation"
    )
    test = texts_of(folder, "prompts", "test")
    assert test
    assert not test & learned
    dropped = json.loads((folder / "sources.json").read_text())[0]["dropped"]
    assert dropped["prompts: a test prompt occurs in an earlier split"] > 0


def test_a_malformed_row_leaves_nothing_behind(tmp_path, capfd):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    words = ["--recipe=smoke", f"--run={tmp_path / 'run'}", f"--text.path={path}"]
    assert main([*words, "--tracking=none"]) == 2
    assert not (tmp_path / "run/data").exists()


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        (Chats, {"source": "reddit"}, "chats.source: must be chitchat, synthetic, none"),
        (Chats, {"min_words": 9, "max_words": 3}, "chats.min_words: must be from 1 to max_words"),
        (Chats, {"context_turns": 0}, "chats.context_turns: must be at least 1, got 0"),
        (Ratings, {"source": "yelp"}, "ratings.source: must be hutto, synthetic, none"),
        (Ratings, {"ranking_size": 1}, "ratings.ranking_size: must be at least 2, got 1"),
        (Ratings, {"sets": ("blogs",)}, "ratings.sets: choose from tweets"),
        (Ratings, {"guard_sets": ("tweets",)}, "no set may train reward and guard"),
        (Ratings, {"synthetic_texts": 3}, "ratings.synthetic_texts: must be at least 20, got 3"),
    ],
)
def test_settings_out_of_range(group, settings, message):
    with pytest.raises(UserError) as caught:
        group(**settings)
    assert message in str(caught.value)


def test_settings_are_checked_with_their_path(tmp_path):
    with pytest.raises(UserError, match=r"prompts\.path: must end in"):
        config_of(tmp_path, prompts=OwnRows(path="prompts.txt"))
    with pytest.raises(UserError, match=r"ratings\.split\.test_frac: must be above 0"):
        config_of(tmp_path, ratings=Ratings(split=Split(test_frac=0.0)))
