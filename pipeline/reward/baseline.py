"""The bag of words every reward model has to beat."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Pairs = Int[np.ndarray, " pair"]

NUM_PAIRS = 40_000
"""Sampled comparisons the regression sees; more changed the accuracy by less than 0.002."""


def bag_of_words_scores(
    texts: Sequence[str],
    *,
    ratings: Float[np.ndarray, " text"],
    scales: Sequence[str],
    held_out: Sequence[str],
    min_gap: float,
    seed: int,
) -> Float[np.ndarray, " held_out"] | None:
    """Returns scores of held-out texts by TF-IDF of words and word pairs and logistic regression.

    The regression is Bradley-Terry with linear scores: it sees differences of the TF-IDF vectors
    of sampled training comparisons. None when no training texts are comparable.

    Args:
        texts: training texts.
        ratings: mean rating of each training text.
        scales: only training texts of the same scale are compared.
        held_out: texts to score.
        min_gap: least difference of mean ratings of a training comparison.
        seed: seed of the sample of comparisons and of their direction.
    """
    from scipy.sparse import diags_array
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    better, worse = sampled_pairs(ratings, scales, min_gap=min_gap, seed=seed)
    if len(better) < 2:
        return None
    direction = np.where(np.arange(len(better)) % 2 == 0, 1.0, -1.0)
    rare = 2 if len(texts) > 100 else 1
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=rare)
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError:
        return None
    differences = diags_array(direction) @ (vectors[better] - vectors[worse])
    model = LogisticRegression(fit_intercept=False, max_iter=300)
    model.fit(differences, direction > 0)
    return np.asarray(vectorizer.transform(held_out) @ model.coef_[0])


def sampled_pairs(
    ratings: Float[np.ndarray, " text"], scales: Sequence[str], *, min_gap: float, seed: int
) -> tuple[Pairs, Pairs]:
    """Returns better and worse text of randomly drawn comparisons within scales.

    All comparisons of some ten thousand texts would not fit into memory.

    Args:
        ratings: mean rating of each text.
        scales: only texts of the same scale are compared.
        min_gap: least difference of the mean ratings; equal ratings never count.
        seed: seed of the draw.
    """
    generator = np.random.default_rng(seed)
    member = np.unique(np.asarray(scales), return_inverse=True)[1]
    order = np.argsort(member, kind="stable")
    sizes = np.bincount(member)
    starts = np.cumsum(sizes) - sizes
    first = generator.integers(len(ratings), size=NUM_PAIRS)
    scale = member[first]
    second = order[starts[scale] + generator.integers(sizes[scale])]
    gap = ratings[first] - ratings[second]
    counts = (np.abs(gap) >= min_gap) & (gap != 0)
    higher = gap[counts] > 0
    first, second = first[counts], second[counts]
    return np.where(higher, first, second), np.where(higher, second, first)
