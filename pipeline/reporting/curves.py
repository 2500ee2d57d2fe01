"""The curves of a stage from its metrics.jsonl."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.charts import Chart, Series, chart
from pipeline.reporting.grouping import grouped

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
    found = curves(rows)
    charts = {
        title: {label: found[name] for label, name in parts.items()}
        for title, parts in grouped(found).items()
    }
    return [
        _chart(title, parts)
        for title, parts in charts.items()
        if any(len(curve) > 1 for curve in parts.values())
    ]


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
