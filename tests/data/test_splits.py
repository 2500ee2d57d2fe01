"""Splits: exact shares, no dependence on order, no group in two splits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splits import Split, assign
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
