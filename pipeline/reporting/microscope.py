"""Kept rollouts as one HTML page: every token with its mask, log-probabilities and reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.ppo.keep import NUMBERS, kept_rollouts
from pipeline.reporting.page import render

ROWS = 16
"""Responses shown of a rollout, from the lowest score to the highest."""
POSITIVE, NEGATIVE = (37, 99, 168), (209, 73, 91)
DEEPEST = 0.55
"""Opacity of the deepest colour: black letters stay readable on it."""
SCALE_SHARE = 0.95
"""Share of the tokens whose colour is not yet the deepest: outliers would bleach the others."""
COLOURED = ("advantages", "kl")


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token as the page shows it."""

    text: str
    counts: bool
    numbers: dict[str, float]
    colours: dict[str, str]
    """CSS colours by what is coloured."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response of a rollout with its prompt."""

    row: int
    """Its place in the rollout, from 0."""
    score: float
    ended: bool
    tokens: list[Token]

    @property
    def written(self) -> list[Token]:
        """The tokens that count."""
        return [token for token in self.tokens if token.counts]

    def total(self, name: str) -> float:
        """Returns a number's sum over the tokens that count."""
        return sum(token.numbers[name] for token in self.written)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Some responses of the rollout of an update."""

    update: int
    num_responses: int
    """Responses of the whole rollout."""
    scales: dict[str, float]
    """Size at which a colour is deepest, by what is coloured."""
    responses: list[Response]


def microscope(folder: Path, *, title: str) -> str:
    """Returns the page of the rollouts that a finished ppo folder keeps."""
    rollouts = [read_rollout(path, update=n) for n, path in kept_rollouts(folder).items()]
    return render({"title": title, "rollouts": rollouts}, template="microscope.html")


def read_rollout(path: Path, *, update: int) -> Rollout:
    """Returns the responses of a kept rollout that are shown, from lowest score to highest."""
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    scales = {name: scale(rows, name) for name in COLOURED}
    order = sorted(range(len(rows)), key=lambda row: rows[row]["score"])
    return Rollout(
        update=update,
        num_responses=len(rows),
        scales=scales,
        responses=[_response(rows[row], number=row, scales=scales) for row in spread(order)],
    )


def spread(order: Sequence[int]) -> list[int]:
    """Returns at most ROWS items at even distances, the first and the last among them."""
    if len(order) <= ROWS:
        return list(order)
    return [order[place * (len(order) - 1) // (ROWS - 1)] for place in range(ROWS)]


def scale(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Returns the size that most counting tokens of a rollout stay below; 1 when all are 0."""
    sizes = sorted(
        abs(value)
        for row in rows
        for value, counts in zip(row[name], row["mask"], strict=True)
        if counts
    )
    return sizes[int(SCALE_SHARE * (len(sizes) - 1))] or 1.0


def colour(value: float, *, scale: float) -> str:
    """Returns a CSS colour: blue above 0, red below, deeper the further from it."""
    red, green, blue = POSITIVE if value >= 0 else NEGATIVE
    return f"rgba({red},{green},{blue},{DEEPEST * min(abs(value) / scale, 1.0):.2f})"


def _response(row: dict[str, Any], *, number: int, scales: dict[str, float]) -> Response:
    tokens = []
    for place, (text, counts) in enumerate(zip(row["tokens"], row["mask"], strict=True)):
        numbers = {name: row[name][place] for name in NUMBERS}
        colours = {name: colour(numbers[name], scale=size) for name, size in scales.items()}
        tokens.append(Token(text=text, counts=counts, numbers=numbers, colours=colours))
    return Response(row=number, score=row["score"], ended=row["ended"], tokens=tokens)
