"""The whole way from rows nobody wants to a trained model: it ends well, or in one clear line."""

import json
import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest

import stages.data
import stages.ppo
import stages.pretrain
import stages.reward
import stages.sft
import stages.tokenizer
from pipeline.checkpoint import open_artifact
from tests.fuzz.support import assert_clear

MADE_UP = ("--chats.synthetic_conversations=24", "--ratings.synthetic_texts=60")
FEW_STEPS = (
    "--training.steps=2", "--training.warmup_steps=0",
    "--training.minibatch_size=2", "--training.microbatch_size=1",
    "--training.eval_every=0", "--saving.every=0", "--eval_rows=4",
)  # fmt: skip
SETTINGS = {
    "data": MADE_UP,
    "pretrain": FEW_STEPS,
    "sft": (*FEW_STEPS, "--samples=1", "--sample_tokens=4"),
    "reward": (*FEW_STEPS[:-1], "--normalisation.num_samples=4"),
    "ppo": (
        "--updates=1", "--prompts_per_update=4", "--minibatch_size=2", "--microbatch_size=2",
        "--validation_prompts=2", "--max_response_tokens=4",
    ),
}  # fmt: skip
KINDS = {
    "data": "dataset", "tokenizer": "tokenizer", "pretrain": "causal-lm", "sft": "causal-lm",
    "reward": "reward", "ppo": "causal-lm",
}  # fmt: skip
WORDS = ["river", "stone", "cloud", "apple", "window", "seven", "quiet", "paper", "garden", "lamp"]


def phrase(index: int, num_words: int = 4) -> str:
    return " ".join(WORDS[(index * 7 + place * 3) % len(WORDS)] for place in range(num_words))


def texts(change: Callable[[int], str]) -> list[dict[str, Any]]:
    return [{"text": change(index)} for index in range(40)]


def pairs(change: Callable[[int], str]) -> list[dict[str, Any]]:
    return [{"prompt": f"say {phrase(i)}", "completion": change(i)} for i in range(40)]


def preferences(change: Callable[[int], tuple[str, str]]) -> list[dict[str, Any]]:
    rows = ((f"say {phrase(i)}", *change(i)) for i in range(40))
    return [{"prompt": p, "chosen": chosen, "rejected": rejected} for p, chosen, rejected in rows]


@pytest.fixture
def outcome(tmp_path, monkeypatch, caplog):
    """Runs stages on own rows: the first refusal, or what is left when all have ended well."""
    shutil.copytree("configs/smoke", tmp_path / "configs" / "smoke")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)

    def run(row_type: str, rows: list[Any], names: str) -> tuple[str, str]:
        lines = [json.dumps(row) for row in rows]
        (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name in names.split():
            caplog.clear()
            own = [f"--{row_type}.path=own.jsonl"] if name == "data" else []
            words = ["--recipe=smoke", "--run=run", "--tracking=none", *SETTINGS.get(name, ())]
            code = getattr(stages, name).main([*words, *own])
            said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
            if code:
                assert code == 2
                (line,) = said
                assert_clear(line)
                assert not (tmp_path / "run" / name / "manifest.json").exists()
                return name, line
            open_artifact(tmp_path / "run" / name, kind=KINDS[name])
        return "", ""

    return run


@pytest.mark.parametrize(
    "change",
    [
        lambda i: (
            f"\U0001f469\u200d\U0001f467 \u05e9\u05dc\u05d5\u05dd e\u0301 {phrase(i, 40)} \ufeff"
        ),
        lambda i: f"{phrase(i, 40)} a\0b \ud800",
        lambda i: phrase(i % 12, 40),
    ],
    ids=["unicode", "nul and half a sign", "duplicates"],
)
def test_odd_texts_are_learned_from(outcome, change):
    assert outcome("text", texts(change), "data tokenizer pretrain") == ("", "")


def test_a_row_of_a_megabyte_is_learned_from(outcome):
    rows = [
        *texts(lambda i: phrase(i, 40)),
        {"text": " ".join(phrase(i, 30) for i in range(8_000))},
    ]
    assert len(rows[-1]["text"]) > 2**20
    assert outcome("text", rows, "data tokenizer pretrain") == ("", "")


@pytest.mark.parametrize(
    ("row_type", "rows", "stage", "line"),
    [
        ("text", texts(lambda _: ""), "data", "own.jsonl line 1: text is empty"),
        ("instructions", pairs(lambda _: " "), "data", "own.jsonl line 1"),
        ("instructions", pairs(lambda i: phrase(i, 400)), "sft", "max_length: "),
        ("preferences", preferences(lambda i: (phrase(i), phrase(i))), "data", "own.jsonl line 1"),
        (
            "preferences", preferences(lambda i: (phrase(i, 400), phrase(i + 1, 400))),
            "reward", "max_length: no ranking of train has two texts of 64 tokens; raise it",
        ),
        ("prompts", [{"prompt": phrase(i, 40)} for i in range(40)], "ppo", "max_prompt_tokens"),
    ],
    ids=[
        "empty texts", "empty replies", "replies too long", "all ties",
        "rankings too long", "prompts too long",
    ],
)  # fmt: skip
def test_rows_of_no_use_are_told_in_one_line(outcome, row_type, rows, stage, line):
    before = {"data": "data", "sft": "data tokenizer pretrain sft"}
    names = before.get(stage, f"{before['sft']} reward")
    names += " ppo" if stage == "ppo" else ""
    told = outcome(row_type, rows, names)
    assert told[0] == stage
    assert line in told[1]


def test_preferences_that_are_all_alike_are_learned_from(outcome):
    """The chosen reply is always the same text: one class is a possible taste."""
    rows = preferences(lambda i: ("yes", phrase(i)))
    assert outcome("preferences", rows, "data tokenizer pretrain sft reward") == ("", "")
