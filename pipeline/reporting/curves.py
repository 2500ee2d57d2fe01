"""The curves of a stage from its metrics.jsonl."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.charts import Chart, Series, chart

OVERLAID = ("train", "validation")
"""Groups whose figures of one name share a chart."""
Curve = list[tuple[float, float]]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Returns (step, value) points by metric; what is no finite number is left out."""
    found: dict[str, Curve] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                found[name].append((float(row["step"]), float(value)))
    return dict(found)


def charts_of(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Returns a chart per metric that has a course, training and validation in one."""
    together: dict[str, dict[str, Curve]] = defaultdict(dict)
    for name, curve in curves(rows).items():
        group, _, figure = name.partition("/")
        together[figure if group in OVERLAID else name][group] = curve
    return [
        _chart(figure if len(parts) > 1 else _full_name(figure, parts), parts)
        for figure, parts in together.items()
        if any(len(curve) > 1 for curve in parts.values())
    ]


def _full_name(figure: str, parts: Mapping[str, Curve]) -> str:
    return figure if "/" in figure else f"{next(iter(parts))}/{figure}"


def _chart(title: str, parts: Mapping[str, Curve]) -> Chart:
    series = [
        Series(
            label=group,
            x=[step for step, _ in curve],
            y=[value for _, value in curve],
            marks="line" if len(curve) > 40 else "both",
        )
        for group, curve in parts.items()
    ]
    return chart(title.replace("_", " "), series=series, x_label="step")
