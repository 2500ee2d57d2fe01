"""Row formats: what is taken, in which form, and every refusal's message."""

import numpy as np
import pytest

from pipeline.data.formats import check_row, read_rows, row_texts
from pipeline.errors import UserError
from tests.data.own import write_rows

USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
ASSISTANT = {"role": "assistant", "content": "hi"}
RANKING = {"prompt": "p", "responses": ["a", "b"], "scores": [1, -1]}


@pytest.mark.parametrize(
    ("row_type", "row", "expected"),
    [
        ("text", {"text": " a  b ", "other": 1}, {"text": "a  b", "group": "a  b"}),
        (
            "text",
            {"messages": [USER, ASSISTANT], "group": 7},
            {"messages": [USER, ASSISTANT], "group": "7"},
        ),
        ("prompts", {"prompt": "p"}, {"prompt": "p", "group": "p"}),
        ("prompts", {"prompt": "&amp;lt;"}, {"prompt": "&amp;lt;", "group": "amp lt"}),
        (
            "prompts",
            {"prompt": "p", "group": "&amp;lt;"},
            {"prompt": "p", "group": "&amp;lt;"},
        ),
        (
            "instructions",
            {"prompt": "p", "completion": "c"},
            {"prompt": "p", "completion": "c", "group": "p"},
        ),
        (
            "instructions",
            {"messages": [USER, ASSISTANT]},
            {"prompt": [USER], "completion": [ASSISTANT], "group": "hello"},
        ),
        (
            "instructions",
            {"prompt": [USER], "completion": ASSISTANT},
            {"prompt": [USER], "completion": [ASSISTANT], "group": "hello"},
        ),
        (
            "preferences",
            {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "0.5"},
            {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5, "group": "p"},
        ),
        (
            "guard_preferences",
            RANKING,
            {
                "prompts": ["p"],
                "set": "own",
                "ids": ["0", "1"],
                "responses": ["a", "b"],
                "scores": [1.0, -1.0],
                "ratings": [[], []],
                "group": "p",
            },
        ),
    ],
)
def test_rows_that_are_taken(row_type, row, expected):
    assert check_row(row, row_type, where="here") == expected


@pytest.mark.parametrize("nothing", [None, "", float("nan"), np.float64("nan")])
def test_a_missing_group_is_none_however_a_table_writes_it(nothing):
    rows = [{"text": text, "group": nothing} for text in ("one", "two")]
    assert [check_row(row, "text", where="here")["group"] for row in rows] == ["one", "two"]
    ranked = RANKING | {"set": nothing, "group": nothing}
    checked = check_row(ranked, "preferences", where="here")
    assert (checked["set"], checked["group"]) == ("own", "p")


@pytest.mark.parametrize(
    ("row_type", "row", "message"),
    [
        ("text", ["a"], "expected an object with columns, got list"),
        ("text", {}, "text is missing"),
        ("text", {"text": None}, "text is missing"),
        ("text", {"text": 3}, "text must be a text, got int"),
        ("text", {"text": " \n"}, "text is empty"),
        ("text", {"messages": []}, "messages must be a list of messages, and not empty"),
        ("text", {"messages": [{"role": "bot", "content": "a"}]}, "a message of messages needs a"),
        ("text", {"messages": [{"role": "user", "content": ""}]}, "content is empty"),
        ("prompts", {"prompt": [ASSISTANT]}, "prompt must end with a message of the user"),
        ("instructions", {"prompt": "p"}, "completion is missing"),
        ("instructions", {"messages": [ASSISTANT]}, "messages must hold a prompt and the reply"),
        (
            "instructions",
            {"prompt": "p", "completion": [USER]},
            "completion must be a text or one message of the assistant",
        ),
        (
            "preferences",
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            "chosen and rejected are the same text",
        ),
        (
            "preferences",
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"},
            "margin must be a number, got 'big'",
        ),
        (
            "preferences",
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "nan"},
            "margin must be finite, got 'nan'",
        ),
        ("preferences", RANKING | {"prompts": ["p", "q"]}, "a ranking has one prompt"),
        ("preferences", RANKING | {"prompts": [3]}, "prompt must be a text, got int"),
        ("preferences", RANKING | {"prompt": [ASSISTANT]}, "prompt must end with a message of"),
        ("preferences", RANKING | {"responses": ["a"]}, "responses must be a list of at least two"),
        ("preferences", RANKING | {"scores": [1]}, "scores must be a list as long as responses"),
        (
            "preferences",
            RANKING | {"scores": [10**400, 1]},
            "scores must be between ±1,000,000,000, got 10",
        ),
        ("preferences", RANKING | {"ids": ["1"]}, "ids and ratings must be lists as long as"),
        (
            "preferences",
            RANKING | {"ratings": [[1, 2.0], [0.4]]},
            "ratings must be whole numbers, got 0.4; multiply them all",
        ),
        ("preferences", RANKING | {"responses": ["a", ""]}, "response is empty"),
    ],
)
def test_rows_that_are_refused(row_type, row, message):
    with pytest.raises(UserError) as caught:
        check_row(row, row_type, where="rows.jsonl line 3")
    assert str(caught.value).startswith(f"rows.jsonl line 3: {message}")


@pytest.mark.parametrize(
    ("row_type", "row"),
    [
        ("text", {"messages": [SYSTEM, USER, ASSISTANT]}),
        ("text", {"messages": [ASSISTANT, USER]}),
        ("prompts", {"prompt": [SYSTEM, USER]}),
        ("prompts", {"prompt": "Hello!"}),
        ("instructions", {"messages": [SYSTEM, USER, ASSISTANT]}),
        ("preferences", {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}),
        ("preferences", RANKING | {"prompt": [SYSTEM, USER]}),
        ("preferences", RANKING | {"prompt": "hello?"}),
    ],
)
def test_a_question_is_one_group_in_every_row_type(row_type, row):
    assert check_row(row, row_type, where="here")["group"] == "hello"


def test_rows_without_a_user_are_grouped_by_their_last_text():
    row = {"messages": [SYSTEM, ASSISTANT]}
    assert check_row(row, "text", where="here")["group"] == "hi"


def test_every_text_of_a_row():
    ranking = check_row(RANKING, "preferences", where="here")
    assert row_texts(ranking) == ["p", "a", "b"]
    assert row_texts({"prompt": [USER], "completion": "c", "group": "g"}) == ["hello", "c"]


@pytest.mark.parametrize("prompt", ["p", [USER, ASSISTANT, USER]])
def test_rows_come_back_as_they_were_written(tmp_path, prompt):
    rows = [check_row(RANKING | {"prompt": prompt}, "preferences", where="here")]
    assert rows[0]["prompts"] == [prompt]
    write_rows(tmp_path, "preferences", split="train", rows=rows)
    write_rows(tmp_path, "preferences", split="test", rows=[])
    assert read_rows(tmp_path, "preferences", split="train") == rows
    with pytest.raises(UserError, match="has no preferences rows for test"):
        read_rows(tmp_path, "preferences", split="test")
