"""Rows as rankings, rankings as features, features as batches."""

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.reward.data import (
    Encoded,
    Ranking,
    RankingCollator,
    TrainingRankings,
    encode,
    features,
    read_rankings,
)
from pipeline.reward.held_out import rated_sets
from pipeline.reward.reading import TokenReading
from pipeline.reward.report import set_report
from tests.data.own import write_rows

RANKING = {
    "prompts": ["how are you?"],
    "set": "tweets",
    "ids": ["1", "2", "3"],
    "responses": ["good", "so so", "bad"],
    "scores": [2.0, 0.0, -1.5],
    "ratings": [[2, 2], [0, 0], [-1, -2]],
}
PAIR = {"prompt": "hi", "chosen": "hello", "rejected": "go away", "margin": None}


class Letters:
    """A tokenizer that reads one token per letter and knows no template but two marks."""

    eos_token_id = 1
    name_or_path = "letters"
    chat_template = None

    def apply_chat_template(self, messages, **_):
        return [2, *self([messages[0]["content"]])["input_ids"][0], 3]

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def ranking(**changes) -> Ranking:
    fields = {
        "scale": "g",
        "group": "g",
        "set": "s",
        "prompts": ["p", "p", "p"],
        "responses": ["aaaa", "b", "cc"],
        "scores": [1.0, 0.0, 3.0],
        "ratings": None,
    }
    return Ranking(**(fields | changes))


def test_a_set_with_raters_is_one_scale_and_its_prompt_serves_all_texts(tmp_path):
    write_rows(tmp_path, "preferences", split="train", rows=[RANKING, RANKING])
    first, second = read_rankings(tmp_path, "preferences", split="train")
    assert first.prompts == ["how are you?"] * 3
    assert first.scale == second.scale == first.set == "tweets"
    assert first.ratings == [[2, 2], [0, 0], [-1, -2]]


def test_without_raters_texts_compare_within_their_row(tmp_path):
    bare = RANKING | {"ratings": [[], [], []]}
    rows = [bare | {"group": "a tree"}, bare | {"group": "another"}]  # of the same prompt
    write_rows(tmp_path, "preferences", split="train", rows=rows)
    rankings = read_rankings(tmp_path, "preferences", split="train")
    assert [one.ratings for one in rankings] == [None, None]
    assert [one.group for one in rankings] == ["a tree", "another"]
    whole = encode(rankings, reading=TokenReading(Letters()), max_length=99)
    rated = rated_sets(whole, scores=np.zeros(6))["tweets"]
    assert rated.groups == ["a tree"] * 3 + ["another"] * 3
    assert set_report(rated, min_gap=0.5, seed=0)["num_pairs"] == 2 * 3


def test_a_pair_is_a_ranking_of_two_whose_gap_is_its_margin(tmp_path):
    rows = [PAIR, PAIR | {"margin": 0.5}]
    write_rows(tmp_path, "preferences", split="train", rows=rows)
    plain, close = read_rankings(tmp_path, "preferences", split="train")
    assert plain.responses == ["hello", "go away"]
    assert plain.scores == [1.0, 0.0]
    assert close.scores == [0.5, 0.0]
    assert plain.scale != close.scale
    assert plain.group == close.group == "hi"


def test_a_conversational_pair_is_read_like_a_plain_one(tmp_path):
    said = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "go away"}],
    }
    write_rows(tmp_path, "preferences", split="train", rows=[said])
    assert read_rankings(tmp_path, "preferences", split="train")[0].responses == [
        "hello",
        "go away",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RANKING | {"scores": [1.0]}, r"row 1: scores must be a list as long"),
        (RANKING | {"scores": [1.0, float("nan"), 0.0]}, r"row 1: scores must be finite"),
        (RANKING | {"responses": ["a", "", "c"]}, r"row 1: response is empty"),
        (PAIR | {"margin": -1.0}, r"preferences-train.parquet row 1: margin must be above 0"),
        (PAIR | {"rejected": None}, r"row 1: rejected is missing"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, message):
    good = RANKING if "responses" in row else PAIR
    write_rows(tmp_path, "preferences", split="train", rows=[good, row])
    with pytest.raises(UserError, match=message):
        read_rankings(tmp_path, "preferences", split="train")


def test_missing_rows_are_told(tmp_path):
    with pytest.raises(UserError, match="has no preferences rows for train"):
        read_rankings(tmp_path, "preferences", split="train")


def test_long_texts_are_left_out_and_counted():
    # Prompt "p" is 3 tokens, a text its letters and EOS: 8, 5 and 6 tokens.
    whole = encode([ranking()], reading=TokenReading(Letters()), max_length=8)
    assert whole.sequences[0][1] == [2, ord("p"), 3, ord("b"), 1]
    assert whole.num_dropped == 0
    shouted = encode(
        [ranking(responses=["A", "b", "c"])], reading=TokenReading(Letters()), max_length=8
    )
    assert shouted.lowered[0][0] == [2, ord("p"), 3, ord("a"), 1]
    assert whole.starts == [[3, 3, 3]]
    shorter = encode([ranking()], reading=TokenReading(Letters()), max_length=6)
    assert shorter.rankings[0].responses == ["b", "cc"]
    assert shorter.rankings[0].scores == [0.0, 3.0]
    assert shorter.num_dropped == 1
    assert encode([ranking()], reading=TokenReading(Letters()), max_length=5).num_dropped == 3


def encoded(*rankings: Ranking, sequences: list[list[list[int]]], start: int = 1) -> Encoded:
    return Encoded(
        rankings=list(rankings),
        sequences=sequences,
        lowered=[[[3, 5, 1] for _ in texts] for texts in sequences],
        starts=[[start] * len(texts) for texts in sequences],
        num_dropped=0,
    )


def test_features_hold_every_comparison_of_the_ranking():
    (row,) = features(encoded(ranking(), sequences=[[[3, 1]] * 3]), min_gap=1.5, soft=False)
    assert list(zip(row["better"].tolist(), row["worse"].tolist(), strict=True)) == [(2, 0), (2, 1)]
    assert row["targets"].tolist() == [1.0, 1.0]


def test_soft_targets_come_from_the_raters():
    # 3 against {1, 3} wins once and ties once: 0.75; against 0 always.
    rated = encoded(ranking(ratings=[[1, 3], [0], [3]]), sequences=[[[3, 1]] * 3])
    (row,) = features(rated, min_gap=1.5, soft=True)
    assert row["targets"].tolist() == [0.75, 1.0]


def test_rankings_without_a_comparison_are_left_out():
    assert features(encoded(ranking(), sequences=[[[3, 1]] * 3]), min_gap=9.0, soft=False) == []


def test_the_collator_keeps_comparisons_with_their_texts():
    pair = ranking(prompts=["p"] * 2, responses=["d", "e"], scores=[1.0, 0.0])
    texts_of = [[[3, 7, 7, 7, 1], [3, 8, 1], [3, 9, 9, 1]], [[4, 5, 1], [4, 6, 6, 6, 6, 1]]]
    rows = features(encoded(ranking(), pair, sequences=texts_of), min_gap=0.0, soft=False)
    batch = RankingCollator(pad_id=0)(rows)
    places = list(zip(batch["better"].tolist(), batch["worse"].tolist(), strict=True))
    assert places == [(0, 1), (2, 0), (2, 1), (3, 4)]
    assert len(batch["labels"]) == 4
    ends = batch["rows"]["input_ids"][tuple(batch["last"].unbind(dim=1))]
    assert ends.tolist() == [1] * 5
    before = batch["last"] - torch.tensor([0, 1])
    words = batch["rows"]["input_ids"][tuple(before.unbind(dim=1))]
    assert words.tolist() == [7, 8, 9, 5, 6]


def varied(rate: float, *, seed: int = 1, lower: float = 0.0) -> list[dict[str, object]]:
    texts = [[[2, 3, *range(10, 60), 1], [2, 3, *range(60, 99), 1], [2, 3, 4, 1]]]
    dataset = TrainingRankings(
        rows=features(encoded(ranking(), sequences=texts, start=2), min_gap=0.0, soft=False),
        order=[0, 0],
        token_dropout=rate,
        lowercase_frac=lower,
        seed=seed,
    )
    return [dataset[place] for place in range(len(dataset))]


def test_responses_are_read_in_lower_case_as_often_as_asked():
    assert [row["sequences"] for row in varied(0.0, lower=1.0)] == [[[3, 5, 1]] * 3] * 2
    assert [3, 5, 1] not in varied(0.0)[0]["sequences"]


def test_token_dropout_keeps_prompt_order_and_eos():
    first, second = varied(0.5)
    for ids in first["sequences"]:
        assert ids[:2] == [2, 3]
        assert ids[2:-1] == sorted(ids[2:-1])
        assert ids[-1] == 1
    assert 10 < len(first["sequences"][0]) < 45
    assert first["sequences"] != second["sequences"]


def test_token_dropout_is_a_function_of_seed_and_place():
    assert [row["sequences"] for row in varied(0.5)] == [row["sequences"] for row in varied(0.5)]
    assert varied(0.5)[0]["sequences"] != varied(0.5, seed=2)[0]["sequences"]
    assert len(varied(0.0)[0]["sequences"][0]) == 53
