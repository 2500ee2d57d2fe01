"""Best-of-n of the SFT model by the reward model: the control every PPO run is held against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pipeline.evaluation.statistics import Array, Estimate, Weights, mean


def kl_bound(n: int) -> float:
    """Returns log n - (n - 1) / n, which best-of-n's divergence from its base never exceeds."""
    return math.log(n) - (n - 1) / n


def best_weights(scores: Float[np.ndarray, "row draw"], *, n: int) -> Float[np.ndarray, "row draw"]:
    """Returns the chance of each draw to be the best of n of the row's draws.

    Averaging over every subset of n draws wastes none of them (Nakano et al. 2021, appendix):
    the draw of ascending rank r, counted from 0, is the best of C(r, n-1) out of C(N, n) subsets.

    Args:
        scores: reward-model score of every draw.
        n: subset size, at most the number of draws.
    """
    draws = scores.shape[1]
    if not 1 <= n <= draws:
        raise ValueError(f"n: must be from 1 to the {draws} draws there are, got {n}")
    chances = np.array([math.comb(rank, n - 1) / math.comb(draws, n) for rank in range(draws)])
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
    return chances[ranks]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Per-row outcomes of best-of-n at the divergence it may have."""

    n: int
    kl: float
    wins: Array


@dataclass(frozen=True, kw_only=True)
class EqualKL:
    """PPO's win rate less that of best-of-n at the same divergence."""

    kl: float
    best_of_n: Estimate
    difference: Estimate
    within_range: bool
    """False where PPO lies beyond the largest n; then it is held against that n."""


def at_equal_kl(points: Sequence[Point], *, kl: float, wins: Array, weights: Weights) -> EqualKL:
    """Returns how far PPO's win rate lies above best-of-n's, interpolated in KL.

    The curve starts at n = 1, which is SFT against itself: divergence 0 and win rate one half.

    Args:
        points: best-of-n, ascending in n.
        kl: PPO's divergence in nats per response.
        wins: PPO's outcomes, row by row.
        weights: bootstrap weights of `resample`.
    """
    curve = [Point(n=1, kl=0.0, wins=np.full(len(wins), 0.5)), *points]
    place = float(np.interp(kl, [point.kl for point in curve], np.arange(len(curve))))
    left = min(int(place), len(curve) - 2)
    share = place - left
    control = (1 - share) * curve[left].wins + share * curve[left + 1].wins
    return EqualKL(
        kl=kl,
        best_of_n=mean(control, weights),
        difference=mean(wins - control, weights),
        within_range=kl <= curve[-1].kl,
    )
