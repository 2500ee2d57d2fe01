"""Texts packed into rows: places, what each token sees, and equality with texts by themselves."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from pipeline.reward import packing
from pipeline.reward.packing import pack_texts, padding_frac
from tests.support import assert_close, tiny_reward_model

PROMPTS = [[3, 9, 4], [3, 9, 4], [3, 4], [3, 9, 4]]
TEXTS = [[5, 1], [6, 6, 1], [7, 1], [8, 8, 8, 1]]


def test_long_texts_come_first_and_rows_hold_one_prompt(monkeypatch):
    monkeypatch.setattr(packing, "ROW_TOKENS", 10)
    packed = pack_texts(PROMPTS, TEXTS, pad_id=0)
    # 3 + 4 + 3 fill a row of 10; the text of two tokens opens another, the other prompt a third.
    assert packed.input_ids.tolist() == [
        [3, 9, 4, 8, 8, 8, 1, 6, 6, 1],
        [3, 9, 4, 5, 1, 0, 0, 0, 0, 0],
        [3, 4, 7, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]
    assert packed.last.tolist() == [[1, 4], [0, 9], [2, 3], [0, 6]]


def test_a_token_sees_its_prompt_and_its_own_text_up_to_itself(monkeypatch):
    monkeypatch.setattr(packing, "ROW_TOKENS", 10)
    seen = pack_texts(PROMPTS, TEXTS, pad_id=0).attention_mask[0, 0]
    assert seen[6].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert seen[8].nonzero()[:, 0].tolist() == [0, 1, 2, 7, 8]
    assert seen[1].nonzero()[:, 0].tolist() == [0, 1]


def test_a_text_longer_than_a_row_has_one_to_itself(monkeypatch):
    monkeypatch.setattr(packing, "ROW_TOKENS", 4)
    packed = pack_texts([[3, 4]] * 2, [[5] * 9 + [1], [6, 1]], pad_id=0)
    assert packed.last.tolist() == [[0, 11], [1, 3]]


def test_rows_have_the_length_that_leaves_the_fewest_positions_empty(monkeypatch):
    monkeypatch.setattr(packing, "ROW_TOKENS", 24)
    # With a prompt of 2 and texts of 7, rows of 24 hold three texts: 3 + 1, two rows of 23 are 46
    # positions. Rows of 16, the next length tried, hold two: two rows of 16, all full.
    prompts, texts = [[3, 4]] * 4, [[5] * 6 + [1]] * 4
    packed = pack_texts(prompts, texts, pad_id=0)
    assert packed.input_ids.shape == (2, 16)
    assert (packed.input_ids != 0).all()
    assert padding_frac(prompts, texts) == 0


def test_the_share_of_empty_positions(monkeypatch):
    monkeypatch.setattr(packing, "ROW_TOKENS", 10)
    # The three rows of ten above hold 10, 5 and 4 tokens.
    assert padding_frac(PROMPTS, TEXTS) == pytest.approx(11 / 30)


tokens = st.lists(st.integers(5, 23), min_size=1, max_size=12)


@given(
    texts=st.lists(st.tuples(st.sampled_from([(3, 4), (3, 9, 4)]), tokens), min_size=1, max_size=9)
)
def test_packed_texts_score_as_they_do_alone(texts):
    model = tiny_reward_model().double()
    prompts, answers = [list(prompt) for prompt, _ in texts], [text for _, text in texts]
    packed = pack_texts(prompts, answers, pad_id=0)
    with torch.no_grad():
        hidden = model.model(**packed.inputs(), use_cache=False).last_hidden_state
        found = model.score(hidden[packed.last[:, 0], packed.last[:, 1]])[:, 0]
        alone = [
            model(input_ids=torch.tensor([prompt + answer])).logits[0, 0]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    assert_close(found, torch.stack(alone), tolerance=1e-9)
