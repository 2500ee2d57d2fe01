"""The Chit-Chat conversations: parsed into turns, made into text and instructions."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.cleaning import clean, has_marker, num_words

ROLES = ("user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One chat; a turn is one speaker's consecutive messages, and speakers alternate."""

    id: str
    turns: tuple[str, ...]


def parse_conversations(raw: bytes) -> list[Conversation]:
    """Returns the conversations of a `dataset.json`: {id: {"messages": [[{"text"}, ...], ...]}}.

    A block of consecutive messages is a turn, its messages joined by spaces. A block without
    text is left out and its neighbours, one speaker's, become one turn.
    """
    chats: dict[str, dict[str, Any]] = json.loads(raw)
    return [
        Conversation(id=key, turns=tuple(_turns(chat["messages"]))) for key, chat in chats.items()
    ]


def num_utterances(raw: bytes) -> int:
    """Number of single messages, before turns are made of them."""
    return sum(len(block) for chat in json.loads(raw).values() for block in chat["messages"])


def text_row(conversation: Conversation) -> dict[str, Any]:
    """Returns the whole conversation as messages; who speaks first is the user."""
    return {"messages": _messages(conversation.turns, first=0), "group": conversation.id}


def instruction_rows(
    conversation: Conversation,
    *,
    min_words: int,
    max_words: int,
    context_turns: int,
    dropped: Counter[str],
) -> list[dict[str, Any]]:
    """Returns one row per adjacent pair of turns of fitting length.

    With one context turn prompt and completion are strings; with more the prompt is the list of
    up to that many preceding messages, the last one the user's, and the completion a list of one.
    """
    rows = []
    for last in range(len(conversation.turns) - 1):
        pair = conversation.turns[last : last + 2]
        if not all(min_words <= num_words(turn) <= max_words for turn in pair):
            dropped["a turn is too short or too long"] += 1
            continue
        first = max(0, last + 1 - context_turns)
        rows.append(_pair(conversation, first=first, last=last, as_text=context_turns == 1))
    return rows


def unusable(conversation: Conversation, *, min_turns: int) -> str | None:
    """Returns why the conversation is dropped, or None when it is kept."""
    if len(conversation.turns) < min_turns:
        return f"fewer than {min_turns} turns"
    if any(has_marker(turn) for turn in conversation.turns):
        return "a special token in the text"
    return None


def _pair(conversation: Conversation, *, first: int, last: int, as_text: bool) -> dict[str, Any]:
    turns = conversation.turns
    if as_text:
        return {"prompt": turns[last], "completion": turns[last + 1], "group": conversation.id}
    # Roles count backwards from the prompt's last turn, which is always the user's.
    prompt = _messages(turns[first : last + 1], first=(last - first) % 2)
    completion = [{"role": "assistant", "content": turns[last + 1]}]
    return {"prompt": prompt, "completion": completion, "group": conversation.id}


def _messages(turns: Sequence[str], *, first: int) -> list[dict[str, str]]:
    return [
        {"role": ROLES[(first + index) % 2], "content": turn} for index, turn in enumerate(turns)
    ]


def _turns(blocks: list[list[dict[str, Any]]]) -> list[str]:
    """Joins each block's messages, and blocks that an empty one had kept apart."""
    turns: list[str] = []
    skipped = False
    for block in blocks:
        text = " ".join(filter(None, (clean(message["text"]) for message in block)))
        if not text:
            skipped = not skipped
        elif skipped and turns:
            turns[-1] = f"{turns[-1]} {text}"
            skipped = False
        else:
            turns.append(text)
            skipped = False
    return turns
