"""The charts of an evaluation: reward and gold against KL, and the reward model's report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.charts import Chart, Series, bin_chart, chart
from pipeline.reporting.curves import Curve

KL_LABEL = "KL to SFT, nats per response"
SFT_COLOUR, PPO_COLOUR, CONTROL_COLOUR, COURSE_COLOUR = "#5b6b7f", "#d1495b", "#2f8f6b", "#e8a7af"


def frontier(results: Mapping[str, Any], *, course: Mapping[str, Curve]) -> list[Chart]:
    """Returns gold score, gold win rate and reward-model score against KL.

    Gold is known at the evaluated points alone; the reward-model score also along PPO's training.

    Args:
        results: what `evaluate` found.
        course: metrics of the ppo stage, by name; none where their KL is not to SFT.
    """
    training = _course(course)
    return [
        chart("Gold score against KL", series=_points(results, "gold"), x_label=KL_LABEL),
        chart(
            "Gold win rate over SFT against KL",
            series=_points(results, "gold_win_rate"),
            x_label=KL_LABEL,
            level=0.5,
        ),
        chart(
            "Reward-model score against KL",
            series=training + _points(results, "reward"),
            x_label=KL_LABEL,
        ),
    ]


def guard_charts(course: Mapping[str, Curve], *, reference: str = "SFT") -> list[Chart]:
    """Returns guard and reward model along training against the square root of the KL, if any.

    In sqrt(KL) over-optimisation is a parabola that turns down (Gao et al. 2023, section 3).

    Args:
        course: metrics of the ppo stage, by name.
        reference: what their KL is to.
    """
    guard, score, kl = (
        dict(course.get(name, [])) for name in ("guard/score", "validation/score", "validation/kl")
    )
    steps = sorted(guard.keys() & score.keys() & kl.keys())
    if not steps:
        return []
    x = [math.sqrt(max(kl[step], 0.0)) for step in steps]
    return [
        chart(
            "Guard and reward model along training",
            series=[
                Series(label=label, x=x, y=[curve[step] for step in steps], marks="both")
                for label, curve in (("guard", guard), ("reward model", score))
            ],
            x_label=f"square root of the KL to {reference}, nats",
        )
    ]


def _course(course: Mapping[str, Curve]) -> list[Series]:
    """Returns PPO's way on the validation prompts, or on its own rollouts where it has none."""
    for group, label in (("validation", "PPO on validation"), ("objective", "PPO while training")):
        score, kl = (dict(course.get(f"{group}/{name}", [])) for name in ("score", "kl"))
        steps = sorted(score.keys() & kl.keys())
        if steps:
            x, y = [kl[step] for step in steps], [score[step] for step in steps]
            return [Series(label=label, x=x, y=y, marks="both", colour=COURSE_COLOUR)]
    return []


def _points(results: Mapping[str, Any], name: str) -> list[Series]:
    """Returns SFT, best-of-n and PPO as points with intervals."""
    policies, comparison = results["policies"], results["comparison"]
    even = {"value": 0.5, "low": 0.5, "high": 0.5}
    sft = policies["sft"].get(name, even)
    ppo = policies["ppo"].get(name) or comparison[name]
    control = results["best_of_n"]
    series = [
        _series("SFT", [0.0], [sft], colour=SFT_COLOUR),
        _series(
            "best of n, at its KL bound",
            [row["kl_bound"] for row in control],
            [row[name] for row in control],
            colour=CONTROL_COLOUR,
            notes=[f"n={row['n']}" for row in control],
        ),
        _series("PPO", [comparison["kl"]["value"]], [ppo], colour=PPO_COLOUR),
    ]
    return [one for one in series if one.x]


def _series(
    label: str,
    x: Sequence[float],
    estimates: Sequence[Mapping[str, float]],
    *,
    colour: str,
    notes: Sequence[str] = (),
) -> Series:
    return Series(
        label=label,
        x=x,
        y=[estimate["value"] for estimate in estimates],
        low=[estimate["low"] for estimate in estimates],
        high=[estimate["high"] for estimate in estimates],
        marks="both",
        notes=notes,
        colour=colour,
    )


def calibration_note(report: Mapping[str, Any]) -> str:
    """Returns the sentence that says what each set's calibration is held against.

    Reports of before it was written down held it against the order.
    """
    told = (
        ("raters", "the share of raters who agree, one of each text and equal ratings half"),
        ("order", "whether the order of the mean ratings agrees"),
    )
    sets = {name: one for name, one in report.get("sets", {}).items() if one["num_pairs"]}
    names = {
        key: [
            name
            for name, one in sets.items()
            if one["calibration"].get("observed_by", "order") == key
        ]
        for key, _ in told
    }
    parts = [f"{words} ({', '.join(names[key])})" for key, words in told if names[key]]
    return f"Calibration holds the probability of the model's choice against {'; '.join(parts)}."


def reward_charts(report: Mapping[str, Any]) -> list[Chart]:
    """Returns calibration and accuracy by margin and by length difference, all sets in each."""
    sets = {name: one for name, one in report.get("sets", {}).items() if one["num_pairs"]}
    if not sets:
        return []
    calibration = [
        Series(
            label=name,
            x=[each["predicted"] for each in one["calibration"]["bins"]],
            y=[each["observed"] for each in one["calibration"]["bins"]],
            marks="both",
        )
        for name, one in sets.items()
    ]
    return [
        chart(
            "Calibration",
            series=calibration,
            x_label="probability the model gives its choice",
            y_label="share that agrees",
            diagonal=True,
        ),
        _by_bin("Accuracy by rating gap", sets, "by_margin", x_label="difference of mean ratings"),
        _by_bin(
            "Accuracy by length difference",
            sets,
            "by_length_difference",
            x_label="words of the better text less the worse",
        ),
    ]


def _by_bin(title: str, sets: Mapping[str, Any], key: str, *, x_label: str) -> Chart:
    bins = next(iter(sets.values()))[key]
    return bin_chart(
        title,
        bins=[bin_name(each) for each in bins],
        rows={name: [each["accuracy"] for each in one[key]] for name, one in sets.items()},
        x_label=x_label,
    )


def bin_name(each: Mapping[str, Any]) -> str:
    """Returns a bin's range, [from, to), in few letters."""
    low, high = each["from"], each["to"]
    if low is None:
        return f"< {high:g}"
    return f"≥ {low:g}" if high is None else f"{low:g} to {high:g}"
