"""What held-out ratings say about a reward model: pure functions of numpy arrays."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from pipeline.evaluation.statistics import Estimate, ratio, resample
from pipeline.reward.loss import rater_targets

MARGIN_EDGES = (0.5, 1.0, 1.5, 2.0, 3.0, float("inf"))
"""Bins of the difference of mean ratings, from the least that counts on; the last is open."""
LENGTH_EDGES = (float("-inf"), -10.0, -3.0, 4.0, 11.0, float("inf"))
"""Bins of words of the better text less those of the worse."""
CALIBRATION_BINS = 10
BOOTSTRAP_SAMPLES = 500
RATER_DRAWS = 20
"""Draws of one rater per text that the human ceiling averages."""
CHUNK_PAIRS = 2**18
"""Pairs whose raters are compared at once: some 20 MB."""

Texts = Float[np.ndarray, " text"]
Pairs = Int[np.ndarray, " pair"]


@dataclass(frozen=True, kw_only=True)
class RatedSet:
    """Held-out texts of one set with what each method says about them.

    Attributes:
        scores: the reward model's raw score; a difference of 1 is a log-odds of 1, so normalised
            scores are multiplied by reward_std first.
        ratings: mean rating of each text.
        lengths: words of each text.
        scales: texts of the same scale are comparable; one name for a whole set of rated texts,
            one name for each pair or ranking otherwise.
        groups: document of each text.
        baseline: the bag-of-words model's score, or None.
        raters: every rater's rating of each text, empty where they are not known; None where none
            are.
    """

    scores: Texts
    ratings: Texts
    lengths: Texts
    scales: Sequence[str]
    groups: Sequence[str]
    baseline: Texts | None = None
    raters: Sequence[list[int]] | None = None


def reward_report(
    sets: Mapping[str, RatedSet], *, min_gap: float = 0.5, soft: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Returns the report of every set as plain JSON values, and the mean accuracy over sets.

    Args:
        sets: held-out texts by the name of their set.
        min_gap: a pair counts when its mean ratings differ by at least this much.
        soft: the model was trained on the raters' distribution, where it is known.
        seed: seed of the bootstrap and of the draws of one rater.
    """
    reports = {
        name: set_report(rated, min_gap=min_gap, soft=soft, seed=seed)
        for name, rated in sets.items()
    }
    known = [report["accuracy"]["value"] for report in reports.values() if report["num_pairs"]]
    return {
        "min_gap": min_gap,
        "mean_accuracy": float(np.mean(known)) if known else None,
        "sets": reports,
    }


def set_report(rated: RatedSet, *, min_gap: float, soft: bool = True, seed: int) -> dict[str, Any]:
    """Returns accuracy with interval, rivals, bins and calibration of one set, as JSON values."""
    better, worse = comparable_pairs(rated.ratings, rated.scales, min_gap=min_gap)
    report: dict[str, Any] = {"num_texts": len(rated.ratings), "num_pairs": len(better)}
    if not len(better):
        return report
    units = bootstrap_units(rated)
    weights = resample(units, samples=BOOTSTRAP_SAMPLES, seed=seed)
    rivals = {
        "accuracy": rated.scores,
        "longer_wins": rated.lengths,
        "bag_of_words": rated.baseline,
    }
    for name, scores in rivals.items():
        report[name] = None
        if scores is not None:
            hits = agreements(scores, better=better, worse=worse)
            report[name] = asdict(
                accuracy(hits, better=better, worse=worse, weights=weights, units=units)
            )
    report["one_human_rater"] = human_ceiling(rated, min_gap=min_gap, seed=seed)
    hits = agreements(rated.scores, better=better, worse=worse)
    gap = rated.ratings[better] - rated.ratings[worse]
    longer = rated.lengths[better] - rated.lengths[worse]
    edges = [min_gap, *(edge for edge in MARGIN_EDGES if edge > min_gap)]
    report["by_margin"] = binned(hits, gap, edges=edges)
    report["by_length_difference"] = binned(hits, longer, edges=LENGTH_EDGES)
    targets = preferences(rated, better=better, worse=worse, soft=soft)
    by_raters = soft and rated.raters is not None
    report["calibration"] = {
        "observed_by": "raters" if by_raters else "order",
        **calibration(rated.scores, better=better, worse=worse, targets=targets),
    }
    report["correlation"] = correlation(rated.scores, rated.ratings)
    return report


def bootstrap_units(rated: RatedSet) -> Sequence[str]:
    """Returns what each text is drawn with: its document; of one document alone, its scale.

    Where all texts have one scale too, each is drawn by itself.
    """
    for names in (rated.groups, rated.scales):
        if len(set(names)) > 1:
            return names
    return [str(text) for text in range(len(rated.scores))]


def comparable_pairs(
    ratings: Texts, scales: Sequence[str], *, min_gap: float
) -> tuple[Pairs, Pairs]:
    """Returns the indices of the better and the worse text of every pair that counts.

    Args:
        ratings: mean rating of each text.
        scales: only texts of the same scale are compared.
        min_gap: least difference of the mean ratings; equal ratings never count.
    """
    member = np.unique(np.asarray(scales), return_inverse=True)[1]
    order = np.argsort(member, kind="stable")
    bounds = np.flatnonzero(np.diff(member[order])) + 1
    better, worse = [], []
    for texts in np.split(order, bounds):
        gap = ratings[texts][:, None] - ratings[texts][None, :]
        high, low = np.nonzero((gap >= min_gap) & (gap > 0))
        better.append(texts[high])
        worse.append(texts[low])
    return np.concatenate(better), np.concatenate(worse)


def pair_accuracy(rated: RatedSet, *, min_gap: float) -> float | None:
    """Returns the share of pairs that the scores order as the raters do, or None without pairs."""
    better, worse = comparable_pairs(rated.ratings, rated.scales, min_gap=min_gap)
    if not len(better):
        return None
    return float(agreements(rated.scores, better=better, worse=worse).mean())


def agreements(scores: Texts, *, better: Pairs, worse: Pairs) -> Float[np.ndarray, " pair"]:
    """Returns 1 where the better text scores higher, 0 where lower, a half where both are equal."""
    return (1.0 + np.sign(scores[better] - scores[worse])) / 2


def accuracy(
    hits: Float[np.ndarray, " pair"],
    *,
    better: Pairs,
    worse: Pairs,
    weights: Float[np.ndarray, "sample text"],
    units: Sequence[str],
) -> Estimate:
    """Returns the share of agreeing pairs with its interval, from a bootstrap over texts.

    A pair of texts that are drawn apart occurs in a sample as often as the two do together:
    w_better w_worse times. One whose texts are drawn together occurs as often as they are drawn, w
    times: squares would make its interval 1.6 times too wide. Both sums are forms in the weights,
    so that no list of resampled pairs is built.

    Args:
        hits: agreement of each pair.
        better: index of each pair's better text.
        worse: index of each pair's worse text.
        weights: how often each text occurs in each bootstrap sample.
        units: what each text is drawn with.
    """
    unit = np.unique(np.asarray(units), return_inverse=True)[1]
    together = unit[better] == unit[worse]
    counted, agreeing = (
        _quadratic_forms(values * ~together, better=better, worse=worse, weights=weights)
        + weights @ np.bincount(better, values * together, minlength=len(unit))
        for values in (np.ones_like(hits), hits)
    )
    whole = ratio(hits, np.ones_like(hits), np.ones((1, len(hits))))
    usable = counted > 0
    draws = agreeing[usable] / counted[usable]
    low, high = np.quantile(draws, (0.025, 0.975)) if usable.any() else (0.0, 1.0)
    return Estimate(value=whole.value, low=float(low), high=float(high))


def _quadratic_forms(
    values: Float[np.ndarray, " pair"],
    *,
    better: Pairs,
    worse: Pairs,
    weights: Float[np.ndarray, "sample text"],
) -> Float[np.ndarray, " sample"]:
    """Returns sum over pairs of w_better value w_worse for every sample's weights w."""
    from scipy.sparse import csr_array

    num_texts = weights.shape[1]
    matrix = csr_array((values, (better, worse)), shape=(num_texts, num_texts))
    return ((matrix @ weights.T).T * weights).sum(axis=1)


def human_ceiling(rated: RatedSet, *, min_gap: float, seed: int) -> float | None:
    """Returns the accuracy of one rater of each text against the mean of its other raters.

    Pairs count when the means of the others differ by at least min_gap; equal ratings of the one
    rater count half. Averaged over several draws of the one rater; None without ratings.
    """
    if rated.raters is None or any(len(raters) < 2 for raters in rated.raters):
        return None
    generator = np.random.default_rng(seed)
    totals = np.array([sum(raters) for raters in rated.raters], dtype=np.float64)
    counts = np.array([len(raters) for raters in rated.raters])
    shares = []
    for _ in range(RATER_DRAWS):
        chosen = generator.integers(counts)
        one = np.array(
            [raters[index] for raters, index in zip(rated.raters, chosen, strict=True)], dtype=float
        )
        others = (totals - one) / (counts - 1)
        better, worse = comparable_pairs(others, rated.scales, min_gap=min_gap)
        if len(better):
            shares.append(agreements(one, better=better, worse=worse).mean())
    return float(np.mean(shares)) if shares else None


def binned(
    hits: Float[np.ndarray, " pair"], values: Float[np.ndarray, " pair"], *, edges: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns count and accuracy of the pairs in each bin [from, to); open ends are None."""
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (values >= low) & (values < high)
        rows.append(
            {
                "from": low if np.isfinite(low) else None,
                "to": high if np.isfinite(high) else None,
                "num_pairs": int(inside.sum()),
                "accuracy": float(hits[inside].mean()) if inside.any() else None,
            }
        )
    return rows


def preferences(
    rated: RatedSet, *, better: Pairs, worse: Pairs, soft: bool
) -> Float[np.ndarray, " pair"]:
    """Returns what a model trained as this one should predict of each pair: P(better wins).

    Args:
        rated: the texts.
        better: index of each pair's text with the higher mean.
        worse: index of each pair's text with the lower mean.
        soft: the probability that one rater prefers it, as in training, where the raters of both
            texts are known; else 1, since of means only their order is learned.
    """
    wins = np.ones(len(better))
    if not soft or rated.raters is None:
        return wins
    known = np.array([bool(ratings) for ratings in rated.raters])
    told = np.flatnonzero(known[better] & known[worse])
    for pairs in np.split(told, range(CHUNK_PAIRS, len(told), CHUNK_PAIRS)):
        wins[pairs] = rater_targets(
            list(rated.raters),
            better=torch.from_numpy(better[pairs]),
            worse=torch.from_numpy(worse[pairs]),
        ).numpy()
    return wins


def calibration(
    scores: Texts, *, better: Pairs, worse: Pairs, targets: Float[np.ndarray, " pair"]
) -> dict[str, Any]:
    """Returns predicted against observed probability, in bins, and the expected calibration error.

    A pair is told in the direction the model prefers: its probability sigmoid(difference) is at
    least a half. ECE = sum of n_bin/n |predicted - observed|: 0 of a model that predicts the
    targets.

    Args:
        scores: of the texts.
        better: index of each pair's better text.
        worse: index of each pair's worse text.
        targets: probability that `better` wins.
    """
    difference = scores[better] - scores[worse]
    predicted = 1 / (1 + np.exp(-np.abs(difference)))
    right = 0.5 + np.sign(difference) * (targets - 0.5)
    place = np.minimum(((predicted - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for index in np.unique(place):
        inside = place == index
        told, seen = float(predicted[inside].mean()), float(right[inside].mean())
        bins.append({"predicted": told, "observed": seen, "num_pairs": int(inside.sum())})
        error += inside.mean() * abs(told - seen)
    return {"bins": bins, "expected_calibration_error": float(error)}


def correlation(scores: Texts, ratings: Texts) -> float | None:
    """Returns Pearson's correlation of score and mean rating, or None when either is constant."""
    if len(scores) < 2 or not np.std(scores) or not np.std(ratings):
        return None
    return float(np.corrcoef(scores, ratings)[0, 1])
