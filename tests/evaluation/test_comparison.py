"""Every figure of a comparison from three prompts, by hand."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.comparison import compare
from pipeline.evaluation.records import Draw, Judged, Record
from tests.evaluation.fakes import records


def judged(text, *, tokens, gold, reward, nll, ended=True):
    return Judged(text=text, num_tokens=tokens, ended=ended, gold=gold, reward=reward, nll=nll)


def draw(gold, reward):
    return Draw(text="", gold=gold, reward=reward)


ROWS = [
    Record(
        row=0,
        prompt="a",
        group="x",
        sft=judged("so so so", tokens=4, gold=0.0, reward=0.0, nll=4.0),
        ppo=judged("i love it", tokens=4, gold=0.6, reward=1.0, nll=4.0),
        kl=1.0,
        k1=0.5,
        draws=(draw(0.5, 2.0), draw(-0.5, 1.0)),
    ),
    Record(
        row=1,
        prompt="b",
        group="x",
        sft=judged("not so bad", tokens=4, gold=0.2, reward=1.0, nll=8.0),
        ppo=judged("i love it", tokens=3, gold=0.2, reward=0.5, nll=2.0, ended=False),
        kl=2.0,
        k1=2.5,
        draws=(draw(0.2, 0.0), draw(0.9, 3.0)),
    ),
    Record(
        row=2,
        prompt="c",
        group="y",
        sft=judged("great", tokens=2, gold=0.4, reward=2.0, nll=3.0),
        ppo=judged("no", tokens=2, gold=-0.4, reward=3.0, nll=6.0),
        kl=3.0,
        k1=3.0,
        draws=(draw(0.4, 1.0), draw(0.3, 2.0)),
    ),
]


@pytest.fixture(scope="module")
def results():
    return compare(ROWS, sizes=[2], bootstrap_samples=100, seed=0)


def test_head_to_head(results):
    found = results["comparison"]
    # Gold: a win, a tie, a loss. Reward: a win, a loss, a win.
    assert found["gold_win_rate"]["value"] == pytest.approx(0.5)
    assert found["reward_win_rate"]["value"] == pytest.approx(2 / 3)
    assert (found["win_frac"], found["tie_frac"]) == (pytest.approx(1 / 3),) * 2
    assert found["kl"]["value"] == pytest.approx(2.0)
    assert found["kl_k1"]["value"] == pytest.approx(2.0)
    assert found["length_ratio"]["value"] == pytest.approx(9 / 10)


def test_policies(results):
    sft, ppo = results["policies"]["sft"], results["policies"]["ppo"]
    assert sft["gold"]["value"] == pytest.approx(0.2)
    assert ppo["reward"]["value"] == pytest.approx(1.5)
    assert ppo["eos_frac"]["value"] == pytest.approx(2 / 3)
    assert sft["length_tokens"]["value"] == pytest.approx(10 / 3)
    assert sft["length_words"] == pytest.approx(7 / 3)
    # Total nats over total tokens, EOS included: 15 / 10 and 12 / 9.
    assert sft["perplexity"]["value"] == pytest.approx(math.exp(1.5))
    assert ppo["perplexity"]["value"] == pytest.approx(math.exp(4 / 3))
    assert (ppo["commonest_reply"], ppo["commonest_reply_frac"]) == ("i love it", 2 / 3)
    assert ppo["distinct_reply_frac"] == pytest.approx(2 / 3)
    # SFT: (so so) twice, (not so), (so bad): 3 of 4. PPO: (i love), (love it), each twice: 2 of 4.
    assert results["distinct_2_bigrams"] == 4
    assert sft["distinct_2"] == pytest.approx(3 / 4)
    assert results["comparison"]["distinct_2_ratio"] == pytest.approx(2 / 3)


def test_best_of_n(results):
    # Best of two by reward: gold 0.5, 0.9 and 0.3, against 0, 0.2 and 0.4: two wins of three.
    only = results["best_of_n"][0]
    assert only["gold_win_rate"]["value"] == pytest.approx(2 / 3)
    assert only["gold"]["value"] == pytest.approx(1.7 / 3)
    assert only["reward"]["value"] == pytest.approx(7 / 3)
    assert results["equal_kl"]["difference"]["value"] == pytest.approx(0.5 - 2 / 3)
    assert results["equal_kl"]["within_range"] is False
    assert results["equal_kl"]["largest_n"] == 2


def test_without_draws_there_is_no_control():
    bare = [dataclasses.replace(row, draws=()) for row in ROWS]
    found = compare(bare, sizes=[2], bootstrap_samples=10, seed=0)
    assert found["best_of_n"] == []
    assert found["equal_kl"] is None


def test_one_word_replies_have_no_distinct_2_ratio():
    short = [
        dataclasses.replace(
            row,
            sft=dataclasses.replace(row.sft, text="yes"),
            ppo=dataclasses.replace(row.ppo, text=""),
        )
        for row in ROWS
    ]
    found = compare(short, sizes=[], bootstrap_samples=10, seed=0)
    assert found["comparison"]["distinct_2_ratio"] is None


def swapped(row):
    return dataclasses.replace(row, sft=row.ppo, ppo=row.sft)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(2, 25))
def test_swapping_the_policies_mirrors_every_rate(seed, count):
    rows = records(count, draws=0, seed=seed)
    ours = compare(rows, sizes=[], bootstrap_samples=20, seed=0)["comparison"]
    theirs = compare([swapped(r) for r in rows], sizes=[], bootstrap_samples=20, seed=0)
    for name in ("gold_win_rate", "reward_win_rate", "length_controlled_win_rate"):
        assert ours[name]["value"] + theirs["comparison"][name]["value"] == pytest.approx(1.0)
    assert ours["distinct_2_ratio"] * theirs["comparison"]["distinct_2_ratio"] == pytest.approx(1)


def test_a_policy_against_itself_is_even():
    rows = [dataclasses.replace(r, ppo=r.sft, kl=0.0, k1=0.0) for r in records(20)]
    found = compare(rows, sizes=[2, 4], bootstrap_samples=20, seed=0)
    assert found["comparison"]["gold_win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["comparison"]["length_controlled_win_rate"]["value"] == pytest.approx(0.5)
    assert found["comparison"]["perplexity_ratio"] == 1
    assert found["equal_kl"]["best_of_n"]["value"] == 0.5
