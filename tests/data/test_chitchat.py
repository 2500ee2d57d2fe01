"""Conversations: turns from blocks of messages, rows from turns."""

import json
from collections import Counter

import pytest

from pipeline.data.chitchat import (
    Conversation,
    instruction_rows,
    num_utterances,
    parse_conversations,
    text_row,
    unusable,
)


def raw(*blocks: list[str]) -> bytes:
    messages = [[{"text": text, "sender": "x"} for text in block] for block in blocks]
    return json.dumps({"one": {"messages": messages}}).encode()


def turns_of(*blocks: list[str]) -> tuple[str, ...]:
    return parse_conversations(raw(*blocks))[0].turns


def rows_of(turns: list[str], *, context_turns: int = 1, dropped: Counter[str] | None = None):
    return instruction_rows(
        Conversation(id="c", turns=tuple(turns)),
        min_words=1,
        max_words=3,
        context_turns=context_turns,
        dropped=Counter() if dropped is None else dropped,
    )


def test_a_block_is_a_turn():
    assert turns_of(["Hello", "how are you?"], ["fine"]) == ("Hello how are you?", "fine")
    assert num_utterances(raw(["Hello", "how are you?"], ["fine"])) == 3


@pytest.mark.parametrize(
    ("blocks", "turns"),
    [
        ([["a"], [" "], ["b"]], ("a b",)),  # one speaker on both sides of the empty block
        ([["a"], [""], [""], ["b"]], ("a", "b")),
        ([[""], ["a"], ["b"]], ("a", "b")),
        ([["a"], ["b"], [""]], ("a", "b")),
    ],
)
def test_empty_blocks(blocks, turns):
    assert turns_of(*blocks) == turns


def test_text_row_alternates_roles():
    row = text_row(Conversation(id="c", turns=("a", "b", "c")))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user"]
    assert row["group"] == "c"


def test_pairs_of_adjacent_turns():
    dropped: Counter[str] = Counter()
    rows = rows_of(["a", "b", "much too long a turn", "c", "d"], dropped=dropped)
    assert [(row["prompt"], row["completion"]) for row in rows] == [("a", "b"), ("c", "d")]
    assert dropped == {"a turn is too short or too long": 2}


def test_context_ends_with_the_user():
    rows = rows_of(["a", "b", "c", "d"], context_turns=3)
    last = rows[-1]
    assert [message["content"] for message in last["prompt"]] == ["a", "b", "c"]
    assert [message["role"] for message in last["prompt"]] == ["user", "assistant", "user"]
    assert last["completion"] == [{"role": "assistant", "content": "d"}]
    # The second row's prompt starts with what was the user's turn, now the assistant's.
    assert [message["role"] for message in rows[1]["prompt"]] == ["assistant", "user"]


def test_unusable_conversations():
    assert unusable(Conversation(id="c", turns=("a",)), min_turns=2) == "fewer than 2 turns"
    marked = Conversation(id="c", turns=("a <|end|>", "b"))
    assert unusable(marked, min_turns=2) == "a special token in the text"
    assert unusable(Conversation(id="c", turns=("a", "b")), min_turns=2) is None
