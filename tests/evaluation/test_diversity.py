"""distinct-2 at one number of bigrams, and repeated replies."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.diversity import bigrams, commonest, distinct_2, distinct_frac, words


def test_words_are_lower_case_without_punctuation():
    assert words("Oh, I don't KNOW!!") == ["oh", "i", "don't", "know"]


def test_bigrams_do_not_cross_replies():
    assert bigrams(["a b", "c", "b a b"]) == Counter({("a", "b"): 2, ("b", "a"): 1})


def test_distinct_2_of_everything_is_unique_over_all():
    # a b, b a, a b: two unique among three.
    assert distinct_2(bigrams(["a b a b"]), size=3) == pytest.approx(2 / 3)


def test_distinct_2_of_one_bigram_is_one_and_of_none_is_zero():
    assert distinct_2(bigrams(["a b a b"]), size=1) == pytest.approx(1.0)
    assert distinct_2(bigrams(["a"]), size=0) == 0.0


def test_more_bigrams_than_there_are_is_refused():
    with pytest.raises(ValueError, match="at most the 1 bigrams there are, got 2"):
        distinct_2(bigrams(["a b"]), size=2)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_distinct_2_is_the_mean_over_every_subsample(times, data):
    counts = Counter({(str(i), str(i)): count for i, count in enumerate(times)})
    size = data.draw(st.integers(1, counts.total()))
    subsamples = list(itertools.combinations(counts.elements(), size))
    slow = sum(len(set(one)) / size for one in subsamples) / len(subsamples)
    assert distinct_2(counts, size=size) == pytest.approx(slow)


def test_the_commonest_reply_and_the_share_of_different_ones():
    replies = ["yes", "no", "yes", "maybe"]
    assert commonest(replies) == ("yes", 0.5)
    assert distinct_frac(replies) == 0.75
