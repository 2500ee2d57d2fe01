"""Checks while PPO runs: they stop the stage before an optimizer moves, naming the rows."""

import math
from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ppo.advantages import token_mean
from pipeline.ppo.experience import Experience

KL_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Mean distance of log-probabilities from the reference's before training: rounding."""

FIRST_KL_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Approximate KL of an update's first minibatch: log-ratios of d on average give d^2 / 2, so these
are d = 0.014 and 0.3, over ten times what rounding does to log-probabilities in fp32 (1e-4 to 1e-3)
and three times what it does in bf16 (up to 0.1). The mean ratio could not tell: its expectation is
1 for any two policies."""

ENGINE_GAP = 0.5
"""Mean distance of an engine's log-probabilities from the policy's, in nats, that rounding does not
explain: it has other weights, or processes its logits otherwise."""

NAMED_ROWS = 8
"""Rows that a message names."""


def check_experience(experience: Experience, *, update: int, precision: str) -> None:
    """Checks a rollout before it is used.

    Raises:
        UserError: an empty response, a score that is not finite, an engine that is not the policy,
            or a policy that differs from the reference before any training.
    """
    empty = [row for row, response in enumerate(experience.responses) if not response]
    if empty:
        raise UserError(f"update {update}: empty responses in rows {empty[:NAMED_ROWS]}")
    finite = experience.scores.isfinite()
    if not bool(finite.all()):
        rows = (~finite).nonzero()[:NAMED_ROWS, 0].tolist()
        raise UserError(f"update {update}: the reward model's score is not finite in rows {rows}")
    if experience.engine_logprobs is not None:
        apart = (experience.logprobs - experience.engine_logprobs).abs()
        gap = float(token_mean(apart, experience.mask))
        if not gap <= ENGINE_GAP:
            raise UserError(
                f"update {update}: the engine and the policy differ by {gap:.2g} nats a token: it "
                "has other weights, or changes what it samples from (docs/engines.md)"
            )
    kl = float(token_mean(experience.kl.abs(), experience.mask))
    if update == 0 and kl > KL_TOLERANCE[precision]:
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
        first_tolerance: largest approximate KL of the first minibatch of an update, before any
            step; None for every other minibatch.
        max_ratio: largest mean ratio that is not an explosion.

    Raises:
        UserError: a loss is not finite, or the policy is not the one that sampled, or far from it.
    """
    where = _named(rows)
    for name, value in metrics.items():
        if name.endswith("/loss") and not math.isfinite(value):
            raise UserError(f"{name} is {value} ({where}); lower the learning rate")
    ratio, kl = metrics["policy/ratio_mean"], metrics["policy/approx_kl"]
    if first_tolerance is not None and kl > first_tolerance:
        raise UserError(
            f"the first minibatch is {kl:.2g} nats a token from its own rollout before any step, "
            f"not 0: the two compute log-probabilities differently ({where})"
        )
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
