"""Estimates with 95% intervals from a bootstrap over whole conversations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
RIDGE = 1e-3
"""Keeps the logistic fit finite when wins and losses separate; moves a rate by less than 0.001."""
NEWTON_STEPS = 60
LARGEST_STEP = 2.0
"""Newton's step is cut here, or a separated sample overshoots before the ridge holds it."""

Array = Float[np.ndarray, " row"]
Weights = Float[np.ndarray, "sample row"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def resample(groups: Sequence[str], *, samples: int, seed: int) -> Weights:
    """Returns how often each row occurs in each bootstrap sample of whole groups.

    Rows of one conversation are no independent evidence, so a group is drawn, never a row.

    Args:
        groups: the group of every row.
        samples: number of bootstrap samples.
        seed: seed of the draw.
    """
    names = sorted(set(groups))
    places = {name: place for place, name in enumerate(names)}
    member = [places[name] for name in groups]
    generator = np.random.default_rng(seed)
    shares = np.full(len(names), 1 / len(names))
    counts = generator.multinomial(len(names), shares, size=samples)
    return counts[:, member].astype(np.float64)


def mean(values: Array, weights: Weights) -> Estimate:
    """Returns the mean over rows with its interval."""
    return ratio(values, np.ones_like(values, dtype=np.float64), weights)


def ratio(
    numerator: Array,
    denominator: Array,
    weights: Weights,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Estimate:
    """Returns transform(sum of the numerator / sum of the denominator) with its interval.

    Args:
        numerator: one term a row.
        denominator: one positive term a row.
        weights: bootstrap weights of `resample`.
        transform: increasing function applied to the ratio, such as np.exp for a perplexity.
    """
    whole = transform(np.asarray(numerator.sum() / denominator.sum()))
    draws = transform((weights @ numerator) / (weights @ denominator))
    return _estimate(float(whole), draws)


def outcomes(
    ours: Float[np.ndarray, "..."], theirs: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Returns 1 where ours is larger, 0 where it is smaller and a half where both are equal."""
    return (1.0 + np.sign(np.asarray(ours) - np.asarray(theirs))) / 2


def length_controlled(wins: Array, length_difference: Array, weights: Weights) -> Estimate:
    """Returns the win rate that a logistic regression predicts at equal lengths.

    P(win) = sigmoid(a + b d / sd(d)), read at d = 0 (after Dubois et al. 2024). The difference is
    divided by its standard deviation and not centred, so that zero still means equal lengths.

    Args:
        wins: 1, a half or 0 for every row.
        length_difference: tokens of our response less those of the other.
        weights: bootstrap weights of `resample`.
    """
    spread = float(np.std(length_difference)) or 1.0
    standardised = np.asarray(length_difference, dtype=np.float64) / spread
    everything = np.vstack([np.ones(len(wins)), weights])
    rates = _sigmoid(_intercepts(np.asarray(wins, dtype=np.float64), standardised, everything))
    return _estimate(float(rates[0]), rates[1:])


def _intercepts(wins: Array, covariate: Array, weights: Weights) -> Float[np.ndarray, " sample"]:
    """Returns the fitted intercept of every weighted sample, by Newton's method side by side."""
    intercept = np.zeros(len(weights))
    slope = np.zeros(len(weights))
    for _ in range(NEWTON_STEPS):
        chance = _sigmoid(intercept[:, None] + slope[:, None] * covariate)
        residual = weights * (wins - chance)
        curvature = weights * chance * (1 - chance)
        gradient_a = residual.sum(1) - RIDGE * intercept
        gradient_b = residual @ covariate - RIDGE * slope
        aa = curvature.sum(1) + RIDGE
        ab = curvature @ covariate
        bb = curvature @ covariate**2 + RIDGE
        determinant = aa * bb - ab**2
        step_a = (bb * gradient_a - ab * gradient_b) / determinant
        step_b = (aa * gradient_b - ab * gradient_a) / determinant
        intercept = intercept + np.clip(step_a, -LARGEST_STEP, LARGEST_STEP)
        slope = slope + np.clip(step_b, -LARGEST_STEP, LARGEST_STEP)
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return intercept


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high))
