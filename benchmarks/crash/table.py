"""The tables of a crash test: by stage and by moment."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.crash.trial import Kill, Outcome

STAGES_HEADING = (
    (
        "| stage | trials | kills | survived | in a row, most | resumed | begun anew"
        " | seconds lost, median | most | trials that differ |"
    ),
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
MOMENTS_HEADING = ("| moment | kills | survived |", "|---|---:|---:|")


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns the Markdown tables of all trials, by stage and by moment, and the exit codes."""
    stages = list(dict.fromkeys(outcome.trial.stage for outcome in outcomes))
    rows = [_row(stage, [o for o in outcomes if o.trial.stage == stage]) for stage in stages]
    if len(stages) > 1:
        rows.append(_row("all", outcomes))
    moments = Counter(kill.strike.moment for o in outcomes for kill in o.kills)
    survived = Counter(kill.strike.moment for o in outcomes for kill in o.survived)
    by_moment = [f"| {name} | {moments[name]} | {survived[name]} |" for name in sorted(moments)]
    ends = Counter(_end(kill) for outcome in outcomes for kill in outcome.kills)
    ended = ", ".join(f"{name}: {number}" for name, number in sorted(ends.items()))
    tables = [*STAGES_HEADING, *rows, "", *MOMENTS_HEADING, *by_moment]
    return [*tables, "", f"Signals and how make tells the end: {ended}."]


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    resumed = sum(kill.resumed_from is not None for kill in kills)
    lost = [kill.lost_seconds for kill in kills]
    cells = [
        name,
        len(outcomes),
        len(kills),
        sum(len(outcome.survived) for outcome in outcomes),
        max((len(outcome.kills) for outcome in outcomes), default=0),
        resumed,
        len(kills) - resumed,
        f"{median(lost):.1f}" if lost else "",
        f"{max(lost):.1f}" if lost else "",
        sum(bool(outcome.differences) for outcome in outcomes),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _end(kill: Kill) -> str:
    whom = "the stage alone" if kill.strike.alone else "the group"
    twice = " twice" if kill.strike.times > 1 else ""
    return f"{kill.strike.signal}{twice} to {whom}, {kill.ended_by}"


def record(outcome: Outcome) -> dict[str, Any]:
    """Returns a trial as plain JSON values."""
    return {
        "trial": outcome.trial.number,
        "stage": outcome.trial.stage,
        "seconds": round(outcome.seconds, 1),
        "kills": [_plain(kill) for kill in outcome.kills],
        "missed": outcome.missed,
        "differences": list(outcome.differences),
    }


def _plain(kill: Kill) -> dict[str, Any]:
    values = asdict(kill)
    strike = values.pop("strike")
    return {
        **strike,
        "delay": round(strike["delay"], 4),
        **values,
        "lost_seconds": round(kill.lost_seconds, 2),
    }
