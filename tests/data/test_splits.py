"""Splits: exact shares, no dependence on order, no group in two splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splits import SPLITS, Places, Split, assign, group_key
from pipeline.errors import UserError


def test_shares_are_exact():
    split_of = assign((str(n) for n in range(1000)), Split(), seed=1)
    counts = {name: list(split_of.values()).count(name) for name in ("train", "validation", "test")}
    assert counts == {"train": 800, "validation": 100, "test": 100}


@given(st.lists(st.text(), unique=True), st.randoms())
def test_order_and_repetition_change_nothing(groups, random):
    shuffled = groups * 2
    random.shuffle(shuffled)
    assert assign(groups, Split(), seed=3) == assign(shuffled, Split(), seed=3)


@given(st.sets(st.text(), min_size=3))
def test_each_split_has_a_group(groups):
    assert set(assign(groups, Split(), seed=0).values()) == {"train", "validation", "test"}


def test_too_few_groups_are_all_training():
    assert assign(["a", "b"], Split(), seed=1) == {"a": "train", "b": "train"}


def test_seed_matters():
    groups = [str(n) for n in range(100)]
    assert assign(groups, Split(), seed=1) != assign(groups, Split(), seed=2)


@pytest.mark.parametrize("value", [0.0, 0.5, -0.1])
def test_shares_out_of_range(value):
    with pytest.raises(UserError, match=r"chats\.split\.test_frac: must be above 0 and below 0\.5"):
        Split(test_frac=value).check("chats.split")


def keys_of(groups, seed=3):
    return np.array([group_key(group, seed=seed) for group in groups], np.uint64)


@given(st.lists(st.text()))
def test_groups_known_by_their_hashes_lie_in_the_same_splits(groups):
    placed = Places().place(keys_of(groups), Split())
    split_of = assign(groups, Split(), seed=3)
    assert [SPLITS[number] for number in placed] == [split_of[group] for group in groups]


def test_a_group_stays_in_the_split_it_was_first_put_into():
    places, old = Places(), [str(n) for n in range(40)]
    first = places.place(keys_of(old), Split())
    new = [f"new {n}" for n in range(20)]
    second = places.place(keys_of([*new, *old]), Split(test_frac=0.25))
    assert second[20:].tolist() == first.tolist()
    # The shares are those of the twenty new groups: a quarter and a tenth.
    assert np.bincount(second[:20]).tolist() == [13, 2, 5]
