"""How varied a set of replies is."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[\w']+")


def words(text: str) -> list[str]:
    """Returns the lower-case words of a text, punctuation aside."""
    return WORD.findall(text.lower())


def bigrams(responses: Sequence[str]) -> Counter[tuple[str, str]]:
    """Returns how often each pair of neighbouring words occurs, never across two responses."""
    counts: Counter[tuple[str, str]] = Counter()
    for response in responses:
        counts.update(itertools.pairwise(words(response)))
    return counts


def distinct_2(counts: Counter[tuple[str, str]], *, size: int) -> float:
    """Returns the expected share of unique bigrams among `size` drawn without replacement.

    A longer text repeats itself more, so two policies are compared at one number of bigrams. The
    mean over all such subsamples is exact: a bigram seen f times out of N is missing from a
    subsample of m with probability C(N-f, m) / C(N, m) (rarefaction, Hurlbert 1971).

    Args:
        counts: bigrams of all responses.
        size: number of bigrams drawn; 0 gives 0.

    Raises:
        ValueError: more bigrams wanted than there are.
    """
    total = counts.total()
    if size > total:
        raise ValueError(f"size: must be at most the {total} bigrams there are, got {size}")
    if size == 0:
        return 0.0
    unique = sum(1 - _missing(total, times, size) for times in counts.values())
    return unique / size


def _missing(total: int, times: int, size: int) -> float:
    """Returns C(total - times, size) / C(total, size)."""
    if times > total - size:
        return 0.0
    return math.exp(
        math.lgamma(total - times + 1)
        - math.lgamma(total - times - size + 1)
        - math.lgamma(total + 1)
        + math.lgamma(total - size + 1)
    )


def commonest(responses: Sequence[str]) -> tuple[str, float]:
    """Returns the commonest response and its share of all."""
    text, times = Counter(responses).most_common(1)[0]
    return text, times / len(responses)


def distinct_frac(responses: Sequence[str]) -> float:
    """Returns the share of different responses among all."""
    return len(set(responses)) / len(responses)
