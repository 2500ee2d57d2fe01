"""Foreign files through every stage that trains: conversations of several turns, to PPO's end."""

from collections.abc import Iterable
from pathlib import Path

import pytest

import stages.data
import stages.ppo
import stages.pretrain
import stages.reward
import stages.sft
import stages.tokenizer
from pipeline.checkpoint import open_artifact
from pipeline.config import load
from pipeline.data.formats import read_rows
from pipeline.storage import read_jsonl
from tests.data.adapters import foreign
from tests.data.adapters.support import written

SMOKE = ["--recipe=smoke", "--tracking=none", "--threads=1", "--chats.source=none"]
NO_STEP = [
    *("--training.steps=2", "--training.warmup_steps=0"),
    *("--training.eval_every=0", "--saving.every=0"),
]
WORDS = {
    "tokenizer": ["--vocabulary_size=400"],
    "pretrain": [*NO_STEP, "--context_length=256"],
    "sft": [*NO_STEP, "--max_length=200", "--samples=2"],
    "reward": [*NO_STEP, "--max_length=200", "--normalisation.num_samples=8"],
    "ppo": [
        "--updates=1", "--prompts_per_update=4", "--minibatch_size=4", "--validation_prompts=4",
        "--max_prompt_tokens=120", "--keep_rollout_every=0", "--optimisation.epochs=1",
    ],
}  # fmt: skip


ROW_TYPES = ("text", "instructions", "prompts", "preferences")
CASES = {
    "turns": ("hh", "sharegpt", "oasst", "oasst"),
    "single": ("ultrafeedback", "alpaca", "tldr", "tldr"),
}
"""The schema of each row type."""


def run_chain(run: Path, schemas: dict[str, str]) -> None:
    """Runs data to ppo, each in this process as its command does."""
    words = [f"--run={run}", "--ratings.source=none"]
    for row_type, schema in schemas.items():
        path = run.parent / f"{schema}.jsonl"
        written(path, foreign.documents(schema, count=40, seed=1))
        words += [f"--{row_type}.path={path}", f"--{row_type}.schema={schema}"]
    assert stages.data.main([*SMOKE, *words]) == 0
    for stage, more in WORDS.items():
        module = getattr(stages, stage)
        module.run(load(module.Config, [*SMOKE[:3], f"--run={run}", *more], stage=stage))


def most_turns(prompts: Iterable[str | list[dict[str, str]]]) -> int:
    """The turns of the longest prompt; one that is a text is a turn."""
    return max(1 if isinstance(prompt, str) else len(prompt) for prompt in prompts)


@pytest.mark.parametrize(("case", "turns"), [("turns", 3), ("single", 1)])
def test_foreign_conversations_reach_an_aligned_model(tmp_path, case, turns):
    run = tmp_path / "run"
    run_chain(run, dict(zip(ROW_TYPES, CASES[case], strict=True)))
    rankings = read_rows(run / "data", "preferences", split="train")
    asked = (row["prompts"][0] if "prompts" in row else row["prompt"] for row in rankings)
    assert most_turns(asked) >= turns
    prompts = read_rows(run / "data", "prompts", split="train")
    assert most_turns(row["prompt"] for row in prompts) >= turns
    reward = open_artifact(run / "reward", kind="reward")
    assert reward.summary["texts_dropped"] == 0
    open_artifact(run / "ppo", kind="causal-lm")
    updates = [row for row in read_jsonl(run / "ppo" / "metrics.jsonl") if "objective/kl" in row]
    assert updates
