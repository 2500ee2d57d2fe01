"""What stages read from outside their run: recorded by its bytes, never by where it lies."""

import shutil
from dataclasses import dataclass

import pytest

import stages.data
import stages.pretrain
import stages.tokenizer
from pipeline.checkpoint import open_artifact
from pipeline.config import StageConfig
from pipeline.data.files import OwnRows
from pipeline.origin import local_origin, outside_parents
from pipeline.ppo.settings import Reward, Source
from pipeline.storage import write_json
from pipeline.tokenizer import train_tokenizer
from stages import ppo, reward, reward_guard
from tests.support import tiny_llama

MADE_UP = {
    "chats": stages.data.Chats(source="synthetic", synthetic_conversations=40),
    "ratings": stages.data.Ratings(source="synthetic", synthetic_texts=20, ranking_size=4),
}


@dataclass(frozen=True, kw_only=True)
class Toy(StageConfig):
    init_from: str = ""

    def outside(self, stage):
        return local_origin(self.init_from, stage=stage)


def settings(run, **changes):
    return {"recipe": "smoke", "run": str(run), "tracking": "none", **changes}


@pytest.fixture
def two_machines(tmp_path):
    """Two absolute places with the same files in them."""
    here, there = tmp_path / "here", tmp_path / "there"
    base = here / "base"
    tokenizer = train_tokenizer(["some words of a text"] * 3, vocabulary_size=300)
    tokenizer.save_pretrained(base)
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(base)
    rows = "".join(f'{{"text": "the text of row {number} goes on"}}\n' for number in range(20))
    (here / "rows.jsonl").write_text(rows)
    shutil.copytree(here, there)
    return here, there


def test_settings_and_names_hold_no_place(two_machines):
    contents, names = [], []
    for place in two_machines:
        base = str(place / "base")
        sources = [Source(model=base), Source(function="configs.rewards:takes_up_the_prompt")]
        configs = {
            "tokenizer": stages.tokenizer.Config(init_from=base),
            "pretrain": stages.pretrain.Config(init_from=base),
            "reward": reward.Config(init_from=base),
            "reward_guard": reward_guard.Config(init_from=base),
            "ppo": ppo.Config(reward=Reward(sources=sources)),
        }
        contents.append({name: config.content() for name, config in configs.items()})
        names.append({name: config.outside(name) for name, config in configs.items()})
        for stage in ("tokenizer", "pretrain", "reward", "reward_guard"):
            assert names[-1][stage] == {f"{stage}/init_from": place / "base"}
        assert names[-1]["ppo"]["score/base"] == place / "base"
        assert names[-1]["ppo"]["score/takes_up_the_prompt"].name == "rewards.py"
    assert contents[0] == contents[1]


def test_a_model_that_is_not_on_this_disk_is_no_parent():
    assert outside_parents(Toy(init_from="owner/name"), "pretrain") == {}
    assert outside_parents(Toy(), "pretrain") == {}


def test_a_changed_byte_of_the_model_is_another_parent(two_machines):
    here, there = (outside_parents(Toy(init_from=str(at / "base")), "x") for at in two_machines)
    assert here["x/init_from"].digest == there["x/init_from"].digest
    write_json(two_machines[1] / "base" / "config.json", {"changed": True})
    changed = outside_parents(Toy(init_from=str(two_machines[1] / "base")), "x")
    assert changed["x/init_from"].digest != here["x/init_from"].digest


def test_two_machines_make_the_same_folders_from_the_same_files(two_machines, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    digests = []
    for place in two_machines:
        text = OwnRows(path=str(place / "rows.jsonl"))
        base, run = str(place / "base"), place / "run"
        stages.data.run(stages.data.Config(**settings(run, text=text), **MADE_UP))
        stages.tokenizer.run(stages.tokenizer.Config(**settings(run, init_from=base)))
        config = stages.pretrain.Config(
            **settings(run, init_from=base, take_as_is=True, sequence_length=16, threads=1)
        )
        stages.pretrain.run(config)
        kinds = {"data": "dataset", "tokenizer": "tokenizer", "pretrain": "causal-lm"}
        made = {name: open_artifact(run / name, kind=kind) for name, kind in kinds.items()}
        assert set(made["pretrain"].content["parents"]) == {
            "data",
            "tokenizer",
            "pretrain/init_from",
        }
        digests.append({name: artifact.digest for name, artifact in made.items()})
    assert digests[0] == digests[1]
