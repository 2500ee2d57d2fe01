"""Rehearsals of few layers and few rows, drawn out to all of them: both are lines."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import require
from pipeline.doctor.blueprint import Blueprint
from pipeline.doctor.ledger import Ledger
from pipeline.doctor.machine import Machine
from pipeline.doctor.rehearsal import Replies
from pipeline.doctor.seen import Rehearsal
from pipeline.doctor.ways import ways_of
from pipeline.progress import without_bars

MOST_TOKENS = 2**20
MOST_ROWS = 512
"""Tokens and rows of a pass that are rehearsed at most: tensors have no contents, but lists of the
tokens are made, and rankings are packed, in seconds."""
LEAST_ROWS = 4
"""Rows that are rehearsed at least: two sizes make a line, and one row has no padding."""

Act = Callable[[Blueprint, Ledger, int], Rehearsal]


def of_replies(act: Callable[..., Rehearsal], replies: Replies, **more: Any) -> Act:
    """Returns an act on replies, as many as it is asked for."""

    def some(blueprint: Blueprint, ledger: Ledger, rows: int) -> Rehearsal:
        return act(blueprint, ledger, replace(replies, rows=rows), **more)

    return some


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Says what a model of full depth does with many rows.

    Attributes:
        blueprint: of the model.
        machine: that it runs on.
    """

    blueprint: Blueprint
    machine: Machine

    def rehearse(self, act: Act, *, rows: int, length: int) -> Rehearsal:
        """Returns a rehearsal of the whole depth and all rows.

        Args:
            act: rehearses a blueprint with so many rows.
            rows: of a pass.
            length: tokens of a row.

        Raises:
            UserError: not even a few rows can be looked at.
        """
        require(
            length <= MOST_TOKENS,
            f"rows of {length:,} tokens are more than the doctor can look at. Shorten them",
        )
        few = min(MOST_ROWS, max(LEAST_ROWS, MOST_TOKENS // length))
        if rows <= few:
            return self._deep(act, rows)
        many = max(LEAST_ROWS, few // 4)  # enough for a line, and changes are tried in seconds
        half, whole = self._deep(act, many // 2), self._deep(act, many)
        return half.along(whole, (rows - many // 2) / (many - many // 2))

    def _deep(self, act: Act, rows: int) -> Rehearsal:
        """Returns a rehearsal of the whole depth out of those of two layers and of three."""
        two, three = (self._act(act, layers, rows) for layers in (2, 3))
        return two.at(self.blueprint.layers, three)

    def _act(self, act: Act, layers: int, rows: int) -> Rehearsal:
        ledger = Ledger(self.machine.rates)
        with ways_of(ledger, is_gpu=self.machine.is_gpu), without_bars():
            return act(self.blueprint.of_depth(layers), ledger, rows)
