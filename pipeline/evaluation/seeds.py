"""Several seeds of one recipe in one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.markdown import table
from pipeline.evaluation.records import read_records
from pipeline.evaluation.statistics import CONFIDENCE, Estimate, mean, outcomes, resample
from pipeline.evaluation.targets import RUN_TARGETS, TARGETS, Ranges, Target, with_ranges
from pipeline.manifest import CHAIN, read_manifest

INTERVAL = "95% interval of the mean by Student's t over seeds"
BOOTSTRAP_SAMPLES = 2000


def t_interval(values: Sequence[float]) -> Estimate | None:
    """Returns the mean over seeds with Student's t interval; None for fewer than two seeds."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    middle = float(np.mean(values))
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(value=middle, low=middle - half, high=middle + half)


def pooled_win_rate(folders: Sequence[Path]) -> Estimate:
    """Returns the gold win rate over all seeds' prompts, bootstrap over conversations.

    A conversation that several seeds were tested on is drawn with all of them.

    Args:
        folders: runs whose `evaluate` is finished.
    """
    rows = [row for folder in folders for row in read_records(folder / "evaluate")]
    ppo, sft = (np.array([row[name]["gold"] for row in rows]) for name in ("ppo", "sft"))
    groups = [row["group"] for row in rows]
    return mean(outcomes(ppo, sft), resample(groups, samples=BOOTSTRAP_SAMPLES, seed=0))


def run_figures(folder: Path, *, summary: Mapping[str, float]) -> dict[str, float]:
    """Returns an evaluation's headline figures with minutes and memory of the whole run.

    Args:
        folder: the run.
        summary: headline figures of its `evaluate`.
    """
    about = [read_manifest(folder / stage)["circumstances"] for stage in CHAIN]
    return dict(summary) | {
        "minutes": sum(one["wall_seconds"] for one in about) / 60,
        "peak_memory_gib": max(one["peak_memory_gib"] for one in about),
    }


def seed_table(
    runs: Mapping[int, Mapping[str, float]], *, pooled: Estimate, ranges: Ranges
) -> list[dict[str, Any]]:
    """Returns one row per figure: each seed's value, mean, interval, target and whether it is met.

    Targets are held against the mean over seeds; where the interval of the win rate must start is
    held against the pooled bootstrap over conversations.

    Args:
        runs: flat figures by seed.
        pooled: win rate of `pooled_win_rate`.
        ranges: of the recipe's own targets.
    """
    held_to = with_ranges(TARGETS + RUN_TARGETS, ranges)
    targets = {target.name: target for target in held_to}
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    rows = []
    for name in names:
        values = {seed: run.get(name) for seed, run in runs.items()}
        known = [value for value in values.values() if value is not None]
        rows.append(_row(name, values, target=targets.get(name)) | _mean(known))
    for row in rows:
        target = targets.get(row["name"])
        held = pooled.low if row["name"] == "gold_win_rate_low" else row["mean"]
        row["met"] = target.met_by(held) if target else None
    order = list(targets)
    return sorted(rows, key=lambda row: order.index(row["name"]) if row["name"] in order else 99)


def _row(name: str, values: Mapping[int, float | None], *, target: Target | None) -> dict[str, Any]:
    return {
        "name": name,
        "title": target.title if target else name.replace("_", " "),
        "values": {str(seed): value for seed, value in values.items()},
        "wanted": target.wanted if target else None,
    }


def _mean(known: Sequence[float]) -> dict[str, Any]:
    estimate = t_interval(known)
    return {
        "mean": float(np.mean(known)),
        "low": estimate.low if estimate else None,
        "high": estimate.high if estimate else None,
    }


def seeds_markdown(rows: Sequence[Mapping[str, Any]], *, pooled: Estimate, recipe: str) -> str:
    """Returns the table as Markdown, with what the interval means."""
    seeds = list(rows[0]["values"])
    header = ["figure", *(f"seed {seed}" for seed in seeds), "mean (interval)", "target", "met"]
    lines = [
        [
            row["title"],
            *(_number(row["values"][seed]) for seed in seeds),
            _number(row["mean"]) + _range(row),
            row["wanted"] or "",
            {True: "yes", False: "no", None: ""}[row["met"]],
        ]
        for row in rows
    ]
    about = (
        f"Recipe `{recipe}`, {len(seeds)} seeds. In brackets: {INTERVAL}. Targets are held against "
        "the mean. Over the prompts of all seeds together, bootstrap over conversations, the gold "
        f"win rate is {pooled.value:.3f} ({pooled.low:.3f} to {pooled.high:.3f}); the target of "
        "the interval's start is held against this interval."
    )
    return "\n\n".join(["# Seeds", about, table(header, lines)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f})"
