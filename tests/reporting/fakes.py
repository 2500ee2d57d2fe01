"""A finished run that was never trained: every folder with invented figures."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint import Artifact, begin, open_artifact
from pipeline.config import StageConfig
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.records import Record
from pipeline.evaluation.targets import figures
from pipeline.ppo.keep import keep_rollout
from pipeline.reward.report import RatedSet, reward_report
from pipeline.storage import write_json
from tests.evaluation.fakes import records
from tests.ppo.worlds import Speller, invented_outcome

CHAIN = {
    "data": ("dataset", ()),
    "tokenizer": ("tokenizer", ("data",)),
    "pretrain": ("causal-lm", ("data", "tokenizer")),
    "sft": ("causal-lm", ("data", "pretrain")),
    "reward": ("reward", ("data", "sft")),
    "ppo": ("causal-lm", ("data", "sft", "reward")),
    "evaluate": ("report", ("data", "pretrain", "sft", "reward", "ppo")),
    "report": ("report", ("data", "evaluate")),
}


def fake_run(
    folder: Path,
    *,
    rows: list[Record] | None = None,
    texts: int = 60,
    report: bool = False,
    rollouts: bool = True,
) -> Path:
    """Writes every stage up to `evaluate`, or `report`, and returns the run folder."""
    config = StageConfig(run=str(folder), tracking="none", recipe="smoke")
    made: dict[str, Artifact] = {}
    for stage, (kind, parents) in CHAIN.items():
        if stage == "report" and not report:
            continue
        mine = {name: made[name] for name in parents}
        with begin(config, stage=stage, kind=kind, parents=mine) as run:
            summary: dict[str, object] = {"loss": 2.5, "tokens": 12345}
            if stage in ("pretrain", "sft", "reward"):
                _log_training(run)
            if stage == "ppo":
                _log_ppo(run, rollouts=rollouts)
            if stage == "evaluate":
                summary = _evaluate(run, rows or records(40), texts=texts)
            run.finish("invented", chosen={}, summary=summary, card="# Invented")
        made[stage] = open_artifact(folder / stage, kind=kind)
    return folder


def results_of(rows: list[Record], *, texts: int = 60) -> dict[str, Any]:
    """The results of an evaluation with a reward-model report on invented ratings."""
    results = compare(rows, sizes=[2, 4], bootstrap_samples=50, seed=0)
    generator = np.random.default_rng(0)
    ratings = generator.normal(size=(2, texts)) * 1.5
    results["reward_model"] = reward_report(
        {
            name: RatedSet(
                scores=rated + generator.normal(size=texts),
                ratings=rated,
                lengths=generator.integers(2, 25, size=texts).astype(float),
                scales=[name] * texts,
                groups=[name] * texts,
                baseline=rated + 2 * generator.normal(size=texts),
            )
            for name, rated in zip(("tweets", "movies"), ratings, strict=True)
        }
    )
    results["alignment_tax"] = {"sft": 80.0, "ppo": 92.0, "ratio": 1.15}
    return results


def _evaluate(run, rows: list[Record], *, texts: int) -> dict[str, Any]:
    results = results_of(rows, texts=texts)
    write_json(run.path / "results.json", results)
    run.log_samples(0, [dataclasses.asdict(row) for row in rows])
    return figures(results)


def _log_training(run) -> None:
    for step in range(10, 510, 10):
        run.log(step, {"train/loss": 3 + 3 * math.exp(-step / 90), "train/learning_rate": 1 / step})
        if step % 100 == 0:
            run.log(step, {"validation/loss": 3.1 + 3 * math.exp(-step / 90)})


def _log_ppo(run, *, rollouts: bool) -> None:
    if rollouts:
        keep_rollout(run.path, invented_outcome(20), update=10, tokenizer=Speller())
    for step in range(30):
        kl = 0.15 * step
        metrics = {"objective/kl": kl, "objective/score": 1.2 * math.sqrt(kl), "kl/coef": 0.1}
        told = {"diagnosis/clip_frac_high": 1.0} if step == 20 else {}
        run.log(step, metrics | {"policy/entropy": 4 - kl / 3, "policy/clip_frac": 0.1} | told)
