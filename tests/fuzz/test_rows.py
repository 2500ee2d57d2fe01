"""Rows of every type with anything in any place: checked, written and read back, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.cleaning import clean, normalise, tidy
from pipeline.data.formats import check_row, read_rows, row_texts
from pipeline.data.prompts import kept_prompts
from pipeline.data.splits import Split, assign
from tests.data.own import write_rows
from tests.fuzz.support import ODD_TEXTS, damaged, fuzz, one_line, texts

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
RANKING = {
    "prompts": ["hi"],
    "set": "own",
    "ids": ["a", "b"],
    "responses": ["good", "bad"],
    "scores": [1.5, -0.5],
    "ratings": [[1, 2], [-1, 0]],
    "group": "g",
}
GOOD_ROWS = {
    "text": [{"text": "hi", "group": "g"}, {"messages": [USER, REPLY]}],
    "instructions": [
        {"prompt": "hi", "completion": "hello", "group": 3},
        {"prompt": [USER], "completion": [REPLY]},
        {"messages": [USER, REPLY, USER, REPLY]},
    ],
    "prompts": [{"prompt": "hi"}, {"prompt": [USER, REPLY, USER]}],
    "preferences": [
        {"prompt": "hi", "chosen": "good", "rejected": "bad", "margin": 0.5},
        {"prompt": [USER], "chosen": [REPLY], "rejected": REPLY | {"content": "bye"}},
        {"prompt": "hi", "responses": ["good", "bad"], "scores": [1, 0]},
        RANKING,
    ],
}
GOOD_ROWS["guard_preferences"] = GOOD_ROWS["preferences"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("row_type", GOOD_ROWS)
@fuzz(40)
@given(data=st.data())
def test_a_row_is_refused_in_one_line_or_comes_back_from_its_file(row_type, folder, data):
    row = data.draw(st.sampled_from(GOOD_ROWS[row_type]).flatmap(damaged))
    checked = one_line(lambda: check_row(row, row_type, where="own.jsonl line 1"))
    if checked is None:
        return
    assert check_row(checked, row_type, where="again") == checked
    assert set(assign([checked["group"]], Split(), seed=1)) == {checked["group"]}
    write_rows(folder, row_type, split="train", rows=[checked])
    assert read_rows(folder, row_type, split="train") == [checked]
    if "prompt" in checked:
        kept_prompts({"train": [checked]}, texts={})
    assert all(text == tidy(text) for text in row_texts(checked))


@fuzz(100)
@given(
    text=st.lists(texts, max_size=4).map("".join) | st.text(alphabet="&#;0x1apmlt ", max_size=40)
)
def test_cleaned_texts_are_clean_and_can_be_written(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert cleaned.encode().decode() == cleaned
    assert "\0" not in cleaned
    assert normalise(cleaned) == normalise(f" {cleaned} ")


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_every_odd_text_is_kept_clean_or_refused(text, folder):
    row = one_line(lambda: check_row({"text": text, "group": text}, "text", where="line 1"))
    if row is not None:
        write_rows(folder, "text", split="odd", rows=[row])
        assert read_rows(folder, "text", split="odd") == [row]
