"""Checks while PPO runs: they stop the stage before an optimizer moves, naming the rows."""

import math
from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ppo.advantages import token_mean
from pipeline.ppo.experience import Experience

RATIO_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""How far the first mean ratio may lie from 1 (and the first KL from 0): rounding, by precision."""

NAMED_ROWS = 8
"""Rows that a message names."""


def check_experience(experience: Experience, *, update: int, precision: str) -> None:
    """Checks a rollout before it is used.

    Raises:
        UserError: an empty response, a score that is not finite, or a policy that differs from the
            reference before any training.
    """
    empty = [row for row, response in enumerate(experience.responses) if not response]
    if empty:
        raise UserError(f"update {update}: empty responses in rows {empty[:NAMED_ROWS]}")
    finite = experience.scores.isfinite()
    if not bool(finite.all()):
        rows = (~finite).nonzero()[:NAMED_ROWS, 0].tolist()
        raise UserError(f"update {update}: the reward model's score is not finite in rows {rows}")
    kl = float(token_mean(experience.kl.abs(), experience.mask))
    if update == 0 and kl > RATIO_TOLERANCE[precision]:
        raise UserError(
            f"update 0: policy and reference differ by {kl:.2g} nats a token before any training; "
            "they must be the same model"
        )


def check_step(
    metrics: Mapping[str, float],
    *,
    rows: Int[Tensor, " minibatch"],
    first_tolerance: float | None,
    max_ratio: float,
) -> None:
    """Checks a minibatch after its backward pass and before the optimizer moves.

    Args:
        metrics: of the minibatch, over all processes.
        rows: its rows.
        first_tolerance: how far the ratio may lie from 1 in the first minibatch of an update; None
            for every other minibatch.
        max_ratio: largest mean ratio that is not an explosion.

    Raises:
        UserError: a loss is not finite, or the ratio is wrong.
    """
    where = _named(rows)
    for name, value in metrics.items():
        if name.endswith("/loss") and not math.isfinite(value):
            raise UserError(f"{name} is {value} ({where}); lower the learning rate")
    ratio = metrics["policy/ratio_mean"]
    if first_tolerance is not None and abs(ratio - 1.0) > first_tolerance:
        raise UserError(f"the first minibatch's mean ratio is {ratio:.4f}, not 1 ({where})")
    if ratio > max_ratio:
        raise UserError(
            f"policy/ratio_mean is {ratio:.3g} ({where}); lower optimisation.learning_rate"
        )


def check_norms(norms: Mapping[str, float], *, rows: Int[Tensor, " minibatch"]) -> None:
    """Raises UserError when a model's gradient is not finite."""
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise UserError(f"{name}/grad_norm is {norm} ({_named(rows)}); lower the learning rate")


def _named(rows: Int[Tensor, " minibatch"]) -> str:
    more = ", …" if len(rows) > NAMED_ROWS else ""
    return "rows " + ", ".join(map(str, rows.tolist()[:NAMED_ROWS])) + more
