"""What the page says, gathered from the finished folders of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import Artifact
from pipeline.evaluation.markdown import ABOUT, equal_kl_sentence, headline
from pipeline.evaluation.records import read_records
from pipeline.evaluation.targets import RUN_TARGETS, TARGETS, figures, judged, with_ranges
from pipeline.ppo.diagnosis import PREFIX, RULES, Rule
from pipeline.ppo.keep import kept_rollouts
from pipeline.reporting.charts import Chart
from pipeline.reporting.curves import charts_of, curves
from pipeline.reporting.figures import (
    bin_name,
    calibration_note,
    frontier,
    guard_charts,
    reward_charts,
)
from pipeline.spacing import evenly_spaced
from pipeline.storage import flatten, read_json, read_jsonl

EVEN_SAMPLES = 12
"""Prompts shown at even distances, good or bad."""
EXTREME_SAMPLES = 4
"""Prompts shown of each extreme."""


@dataclass(frozen=True, kw_only=True)
class StageView:
    """A stage as the page shows it."""

    name: str
    kind: str
    digest: str
    parents: list[str]
    """Each parent's name and the start of its digest."""
    minutes: float
    memory: float
    """Peak resident memory in GiB."""
    circumstances: dict[str, Any]
    summary: dict[str, Any]
    charts: list[Chart]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts chosen by one rule."""

    title: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A rule that PPO's diagnoser saw hold, and when it was first seen."""

    update: int
    rule: Rule


def page_content(artifacts: Mapping[str, Artifact], *, title: str) -> dict[str, Any]:
    """Returns the values of the page's template.

    Args:
        artifacts: every stage's finished folder, in the order of the run.
        title: name of the run.
    """
    evaluation = artifacts["evaluate"].path
    results = read_json(evaluation / "results.json")
    records = read_records(evaluation)
    stages = [stage_view(artifact) for artifact in artifacts.values()]
    minutes = sum(stage.minutes for stage in stages)
    flat = figures(results)
    targets = with_ranges(TARGETS + RUN_TARGETS, results.get("targets", {}))
    spent = {"minutes": minutes, "peak_memory_gib": max(stage.memory for stage in stages)}
    logged = read_jsonl(artifacts["ppo"].path / "metrics.jsonl")
    report = results.get("reward_model") or {}
    course, stays = curves(logged), not moves_reference(artifacts["ppo"])
    return {
        "title": title,
        "about": ABOUT,
        "headline": headline(flat),
        "targets": judged(flat | spent, targets),
        "results": results,
        "equal_kl": equal_kl_sentence(results["equal_kl"]),
        "num_prompts": len(records),
        "frontier": frontier(results, course=course if stays else {})
        + guard_charts(course, reference="SFT" if stays else "the reference of the moment"),
        "diagnoses": diagnoses(logged),
        "num_rules": len(RULES),
        "rollouts": list(kept_rollouts(artifacts["ppo"].path)),
        "reward_sets": report.get("sets", {}),
        "reward_gap": report.get("min_gap"),
        "reward_charts": reward_charts(report),
        "calibration_note": calibration_note(report),
        "bin_name": bin_name,
        "samples": choose_samples(records),
        "stages": stages,
        "minutes": minutes,
    }


def stage_view(artifact: Artifact) -> StageView:
    """Returns what the page shows of one stage."""
    about = artifact.manifest["circumstances"]
    return StageView(
        name=artifact.stage,
        kind=artifact.kind,
        digest=artifact.digest,
        parents=[
            f"{name} {parent['digest'][:8]}" for name, parent in artifact.content["parents"].items()
        ],
        minutes=about["wall_seconds"] / 60,
        memory=about["peak_memory_gib"],
        circumstances=about,
        summary=flatten(artifact.summary),
        charts=charts_of(read_jsonl(artifact.path / "metrics.jsonl")),
    )


def moves_reference(ppo: Artifact) -> bool:
    """Returns whether the KL that PPO logged is to a reference that was SFT at first only."""
    rate: float = ppo.config.get("kl", {}).get("reference_rate", 0.0)
    return rate > 0


def diagnoses(rows: Sequence[Mapping[str, Any]]) -> list[Diagnosis]:
    """Returns what PPO's diagnoser told, in the order it was told."""
    return [
        Diagnosis(update=row["step"], rule=rule)
        for row in rows
        for rule in RULES
        if f"{PREFIX}{rule.name}" in row
    ]


def choose_samples(records: Sequence[dict[str, Any]]) -> list[Samples]:
    """Returns prompts at even distances, and the extremes that a flattering choice would hide."""
    even = [records[index] for index in evenly_spaced(len(records), EVEN_SAMPLES)]
    losses = sorted(records, key=lambda row: row["ppo"]["gold"] - row["sft"]["gold"])
    far = sorted(records, key=lambda row: -row["kl"])
    return [
        Samples(title="Evenly spaced over the test prompts", rows=even),
        Samples(title="Where PPO loses most gold", rows=losses[:EXTREME_SAMPLES]),
        Samples(title="Where PPO moved furthest from SFT", rows=far[:EXTREME_SAMPLES]),
    ]
