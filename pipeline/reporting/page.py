"""The page itself: a template with every value escaped."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SMALL = 0.001
"""Smaller figures are written with an exponent."""
DIGITS = ((10, 3), (100, 2), (1000, 1), (math.inf, 0))
"""Decimals of a figure below each limit: about four letters in all."""


def render(content: Mapping[str, Any], *, template: str = "page.html") -> str:
    """Returns the HTML page; whatever a model or a user wrote in it is shown, never obeyed."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["interval"] = interval
    environment.filters["words"] = words
    return environment.get_template(template).render(content)


def figure(value: Any) -> str:
    """Returns a value in at most about five characters; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if 0 < size < SMALL:
        return f"{value:.1e}"
    return f"{value:,.{next(digits for limit, digits in DIGITS if size < limit)}f}"


def interval(estimate: Mapping[str, float] | None) -> str:
    """Returns an estimate as `value (low to high)`."""
    if estimate is None:
        return "-"
    value, low, high = (figure(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def words(name: str) -> str:
    """Returns a figure's name as words."""
    return name.replace("_", " ")
