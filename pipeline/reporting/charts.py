"""Charts as SVG images that a page can hold without any other file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.terminal import printable

INCHES = (4.2, 3.0)
"""Drawn at about the width of a phone, so that its letters stay readable there."""
COLOURS = ("#2563a8", "#d1495b", "#2f8f6b", "#b07c1e", "#7a5aa6", "#5b6b7f")
MARKS = {"line": "-", "points": "o", "both": "o-"}
STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3",
    "axes.labelcolor": "#333d4b",
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#333d4b",
    "ytick.color": "#333d4b",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "rlhf-pipeline",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or cloud of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marks: str = "line"
    """line, points or both."""
    low: Sequence[float] | None = None
    """Lower ends of the intervals, if any; then high too."""
    high: Sequence[float] | None = None
    notes: Sequence[str] = ()
    """A word beside each point."""
    colour: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart."""

    title: str
    source: str
    """A data: address with the whole image."""
    description: str
    """What is in it, for those who cannot see it."""


def chart(
    title: str,
    *,
    series: Sequence[Series],
    x_label: str,
    y_label: str = "",
    diagonal: bool = False,
    level: float | None = None,
) -> Chart:
    """Returns a chart of the series.

    Args:
        title: stands above the axes.
        series: what is drawn, in the order of the legend.
        x_label: under the axis.
        y_label: beside the axis; nothing when empty.
        diagonal: draw y = x, where perfect calibration would lie.
        level: draw a horizontal line there.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "step"))
        if diagonal:
            axes.axline((0.5, 0.5), (1, 1), color="#8a94a3", linewidth=1, linestyle=":")
        if level is not None:
            axes.axhline(level, color="#8a94a3", linewidth=1, linestyle=":")
        for number, one in enumerate(series):
            _draw(axes, one, colour=one.colour or COLOURS[number % len(COLOURS)])
        if len(series) > 1:
            _legend(figure)
        source = _address(figure)
    names = ", ".join(one.label for one in series)
    return Chart(title=title, source=source, description=f"{title}: {names} by {x_label}")


def bin_chart(
    title: str, *, bins: Sequence[str], rows: dict[str, Sequence[float | None]], x_label: str
) -> Chart:
    """Returns an accuracy per bin and set as dots; a bin without pairs stays empty.

    Args:
        title: stands above the axes.
        bins: name of each bin.
        rows: by the name of its set, one share per bin or None.
        x_label: under the axis.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=x_label, ylabel="accuracy")
        axes.axhline(0.5, color="#8a94a3", linewidth=1, linestyle=":")
        for number, (name, values) in enumerate(rows.items()):
            known = [(place, value) for place, value in enumerate(values) if value is not None]
            axes.plot(
                [place for place, _ in known],
                [value for _, value in known],
                MARKS["both"],
                label=printable(name),
                color=COLOURS[number % len(COLOURS)],
            )
        axes.set_xticks(range(len(bins)), bins)
        _legend(figure)
        source = _address(figure)
    return Chart(title=title, source=source, description=f"{title} for {', '.join(rows)}")


def _draw(axes: Any, one: Series, *, colour: str) -> None:
    axes.plot(one.x, one.y, MARKS[one.marks], label=printable(one.label), color=colour)
    if one.low is not None and one.high is not None:
        axes.vlines(one.x, one.low, one.high, color=colour, alpha=0.5)
    for x, y, note in zip(one.x, one.y, one.notes, strict=False):
        axes.annotate(note, (x, y), (5, -9), textcoords="offset points", fontsize=7.5, color=colour)


def _legend(figure: Figure) -> None:
    """Puts the legend below the axes, where no curve can run behind it."""
    figure.legend(loc="outside lower center", ncols=2)


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
