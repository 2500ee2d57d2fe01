"""ShareGPT: whole conversations, pieces of long ones, system prompts, turns that are missing."""

from typing import Any

import pytest

from pipeline.errors import UserError
from tests.data.adapters.support import assistant, read, user


def row(*turns: tuple[str, Any], key: Any = "QWJhYvA_0") -> dict[str, Any]:
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    return {"id": key, "conversations": conversations}


LONG = row(("human", "Hi."), ("gpt", "Hello!"), ("human", "Why?"), ("gpt", "Because."))
FIRST = [user("Hi."), assistant("Hello!")]


def test_every_reply_is_an_instruction_with_all_before_it(tmp_path):
    rows, dropped = read(tmp_path, [LONG], "sharegpt", "instructions")
    assert rows == [
        {"prompt": FIRST[:1], "completion": FIRST[1:], "group": "QWJhYvA"},
        {"prompt": [*FIRST, user("Why?")], "completion": [assistant("Because.")],
         "group": "QWJhYvA"},
    ]  # fmt: skip
    assert not dropped


def test_every_question_is_a_prompt_and_the_whole_is_the_text(tmp_path):
    prompts, _ = read(tmp_path, [LONG], "sharegpt", "prompts")
    assert [one["prompt"] for one in prompts] == [FIRST[:1], [*FIRST, user("Why?")]]
    ((text,), _) = read(tmp_path, [LONG], "sharegpt", "text")
    assert text["messages"] == [*FIRST, user("Why?"), assistant("Because.")]


def test_a_last_question_is_a_prompt_but_no_instruction(tmp_path):
    asked = row(("human", "Hi."), ("gpt", "Hello!"), ("human", "Why?"))
    for row_type in ("instructions", "text"):
        rows, dropped = read(tmp_path, [asked], "sharegpt", row_type)
        assert len(rows) == 1
        assert dropped == {"turns left out: a last question without a reply": 1}
    rows, dropped = read(tmp_path, [asked], "sharegpt", "prompts")
    assert len(rows) == 2
    assert not dropped


def test_a_piece_may_begin_with_a_reply(tmp_path):
    piece = row(("gpt", "So."), ("human", "Go on."), ("gpt", "Well."), key="QWJhYvA_14")
    rows, dropped = read(tmp_path, [LONG, piece], "sharegpt", "instructions")
    assert rows[-1]["prompt"] == [user("Go on.")]
    assert {one["group"] for one in rows} == {"QWJhYvA"}
    assert dropped == {"turns left out: a reply before the first question": 1}


def test_a_system_prompt_stays_and_an_empty_one_is_none(tmp_path):
    rows, _ = read(
        tmp_path,
        [
            row(("system", text), ("human", "q"), ("gpt", "a"))
            for text in ("Be brief.", "")
        ],
        "sharegpt",
        "instructions",
    )  # fmt: skip
    assert rows[0]["prompt"] == [{"role": "system", "content": "Be brief."}, user("q")]
    assert rows[1]["prompt"] == [user("q")]


def test_speakers_go_by_several_names_and_their_turns_are_joined(tmp_path):
    turns = (("user", "a"), ("user", "b"), ("chatgpt", "c"), ("bard", "d"))
    rows, _ = read(tmp_path, [row(*turns)], "sharegpt", "instructions")
    assert rows[0]["prompt"] == [user("a\n\nb")]
    assert rows[0]["completion"] == [assistant("c\n\nd")]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (row(("human", "q"), ("gpt", "")), "an empty turn"),
        (row(("human", None), ("gpt", "a")), "an empty turn"),
        (row(("human", "q")), "no final reply"),
        (row(("gpt", "a")), "no turn of the user before the reply"),
        (row(), "no turn of the user before the reply"),
        (row(("system", "s")), "no turn of the user before the reply"),
        (
            row(("human", "q"), ("system", "s"), ("gpt", "a")),
            "a system message inside the conversation",
        ),
        (
            row(("human", "q"), ("function_call", "f()"), ("gpt", "a")),
            "a turn of another speaker than human, user, gpt",
        ),
    ],
)
def test_a_conversation_without_an_exchange_is_dropped(tmp_path, odd, reason):
    rows, dropped = read(tmp_path, [LONG, odd], "sharegpt", "instructions")
    assert len(rows) == 2
    assert [why for why in dropped if why.startswith(reason)]


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("QWJhYvA_14", "QWJhYvA"),
        ("example_1", "example_1"),
        ("identity_7", "identity_7"),
        (12, "12"),
        (None, "hi"),
        ("", "hi"),
    ],
)
def test_the_document_is_the_conversation(tmp_path, key, group):
    rows, _ = read(tmp_path, [row(("human", "Hi!"), ("gpt", "Ho."), key=key)], "sharegpt", "text")
    assert rows[0]["group"] == group


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": "a", "items": []}, "conversations is missing"),
        ({"conversations": "hi"}, "conversations must be a list of turns {from, value}, got str"),
        ({"conversations": ["hi"]}, "a turn of conversations needs from and value"),
        ({"conversations": [user("q")]}, "a turn of conversations needs from and value"),
        (row(("human", 3)), "value must be a text, got int"),
    ],
)
def test_a_file_of_another_schema_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [wrong], "sharegpt", "instructions")
    assert f"foreign.jsonl line 1: {message}; sharegpt needs conversations" in str(caught.value)
