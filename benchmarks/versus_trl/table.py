"""The table of a comparison."""

from statistics import median
from typing import Any

from benchmarks.versus_trl.workload import EPOCHS

PHASES = ("generation", "scoring", "training", "total")
SIDES = ("trl", "ours")
HEADING = (
    (
        "| workload | phase | TRL, s | ours, s | ratio | TRL, tokens/s | ours, tokens/s"
        " | TRL, of limit | ours, of limit |"
    ),
    "|---|---|---|---|---|---|---|---|---|",
)


def lines(result: dict[str, Any], *, limit: float) -> list[str]:
    """Returns the rows of a workload: medians, and the ratio's median, smallest and largest.

    Args:
        result: figures of every update by side, and the work and tokens of every rollout.
        limit: FLOP/s of matrix products; the last columns are the work needed, by the seconds
            taken, as a share of it.
    """
    rows = []
    for phase in PHASES:
        seconds = {side: _seconds(result, side=side, phase=phase) for side in SIDES}
        ratios = [a / b for a, b in zip(seconds["trl"], seconds["ours"], strict=True)]
        passes = EPOCHS if phase == "training" else 1
        cells = [f"{median(seconds[side]):.2f}" for side in SIDES]
        cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        speeds = [_median_rate(result["tokens"], seconds[side]) * passes for side in SIDES]
        cells += [f"{speed:,.0f}" for speed in speeds]
        shares = [_median_rate(result["work"][phase], seconds[side]) / limit for side in SIDES]
        cells += [f"{share:.0%}" for share in shares]
        rows.append(f"| {result['workload']} | {phase} | {' | '.join(cells)} |")
    memory = {side: result[side][-1]["peak_mb"] for side in SIDES}
    rows.append(
        f"| {result['workload']} | peak memory, MB | {memory['trl']:,.0f} | {memory['ours']:,.0f} "
        f"| {memory['trl'] / memory['ours']:.2f} | | | | |"
    )
    return rows


def _seconds(result: dict[str, Any], *, side: str, phase: str) -> list[float]:
    """Seconds of each update; in generation, where each samples rows of its own, of as many tokens.

    A total takes the phases as they were.
    """
    figures = result[side]
    if phase != "generation":
        return [each[phase] for each in figures]
    pairs = zip(figures, result["tokens"], strict=True)
    return [each[phase] / each["sampled_tokens"] * tokens for each, tokens in pairs]


def _median_rate(amounts: list[float], seconds: list[float]) -> float:
    return median(amount / taken for amount, taken in zip(amounts, seconds, strict=True))
