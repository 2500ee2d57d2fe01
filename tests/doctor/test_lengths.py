"""Lengths of rows: those that the stages themselves read, or as long as they may be."""

import dataclasses
import shutil
from statistics import fmean

import pytest

from pipeline.doctor import lengths
from pipeline.doctor.lengths import UNKNOWN, Lengths, lengths_of, looked_at
from pipeline.instructions import read_examples
from pipeline.models import load_tokenizer
from pipeline.ppo.inputs import read_prompts
from pipeline.reward.data import encode, read_rankings
from pipeline.reward.reading import TokenReading
from stages.doctor import Config, recipe_of
from stages.ppo import Config as PPOConfig
from tests.support import make_corpus

LIMITS = ("--sft.max_length=24", "--reward.max_length=30", "--ppo.max_prompt_tokens=12")
"""Some rows are longer, and are left out."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    make_corpus(place)
    return place


@pytest.fixture
def recipe(folder):
    return recipe_of(Config(recipe="smoke", run=str(folder), words=LIMITS))


def test_means_are_those_of_the_rows_that_stages_read(folder, recipe, monkeypatch):
    monkeypatch.setattr(lengths, "LOOKED_AT", 10**6)
    tokenizer, data = load_tokenizer(folder / "tokenizer"), folder / "data"
    found = lengths_of(recipe)

    path = data / "instructions-train.parquet"
    examples = read_examples(path, tokenizer=tokenizer, max_length=24)
    assert examples.num_dropped > 0
    assert found.rows["sft"] == pytest.approx(fmean(examples.lengths))
    ends = [row.labels.count(tokenizer.eos_token_id) for row in examples.rows]
    learned = [sum(label != -100 for label in row.labels) for row in examples.rows]
    assert found.reply == pytest.approx(sum(learned) / sum(ends))

    rankings = read_rankings(data, "preferences", split="train")
    encoded = encode(rankings, reading=TokenReading(tokenizer), max_length=30)
    assert encoded.num_dropped > 0
    rows = list(zip(encoded.sequences, encoded.starts, strict=True))
    alone = [sum(map(len, texts)) for texts, _ in rows]
    packed = [starts[0] + sum(map(len, texts)) - sum(starts) for texts, starts in rows]
    assert found.rows["reward"] == pytest.approx(fmean(packed))
    unpacked = dataclasses.replace(recipe.configs["reward"], pack=False)
    apart = dataclasses.replace(recipe, configs={**recipe.configs, "reward": unpacked})
    assert lengths_of(apart).rows["reward"] == pytest.approx(fmean(alone))

    prompts = read_prompts(data, split="train", tokenizer=tokenizer, max_tokens=12)
    assert prompts.num_dropped > 0
    assert found.prompt == pytest.approx(fmean(map(len, prompts.tokens)))


def test_some_rows_tell_about_what_all_do(recipe, monkeypatch):
    some = lengths_of(recipe)
    monkeypatch.setattr(lengths, "LOOKED_AT", 10**6)
    every = lengths_of(recipe)
    for name in ("prompt", "reply"):
        assert getattr(some, name) == pytest.approx(getattr(every, name), rel=0.15)
    assert some.rows == {
        name: pytest.approx(tokens, rel=0.15) for name, tokens in every.rows.items()
    }


def test_nothing_is_known_before_the_rows_are_there(tmp_path, recipe):
    assert lengths_of(dataclasses.replace(recipe, folder=tmp_path)) == UNKNOWN


def test_damaged_rows_are_a_finding_and_nothing_is_known(recipe, folder, tmp_path):
    other = dataclasses.replace(recipe, folder=shutil.copytree(folder, tmp_path / "run"))
    assert looked_at(other) == (lengths_of(recipe), [])
    (other.folder / "data" / "preferences-train.parquet").write_bytes(b"xx")
    found, [damaged] = looked_at(other)
    assert (found, damaged.state) == (UNKNOWN, "wrong")
    assert "preferences-train.parquet is missing or was altered. Run: make data" in damaged.text


def test_a_reward_model_with_a_tokenizer_of_its_own_reads_other_tokens(recipe):
    reward = dataclasses.replace(recipe.configs["reward"], init_from="some/encoder")
    other = dataclasses.replace(recipe, configs={**recipe.configs, "reward": reward})
    assert "reward" not in lengths_of(other).rows


def test_what_is_not_known_is_as_long_as_it_may_be_and_nothing_is_longer():
    config = PPOConfig(max_prompt_tokens=60, max_response_tokens=40)
    assert UNKNOWN.row_share("sft", 128) == UNKNOWN.exchange_share(config) == 1
    known = Lengths(rows={"sft": 32.0}, prompt=20.0, reply=10.0)
    assert (known.row_share("sft", 128), known.row_share("reward", 128)) == (0.25, 1)
    assert known.exchange_share(config) == 0.3
    longer = Lengths(rows={"sft": 500.0}, prompt=500.0, reply=500.0)
    assert longer.row_share("sft", 128) == longer.exchange_share(config) == 1
