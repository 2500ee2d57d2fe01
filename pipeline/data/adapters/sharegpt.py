"""ShareGPT: whole conversations with an assistant, as people shared them.

    {"id": text, "conversations": [{"from": "human" | "gpt" | "system", "value": text}, ...]}

Every reply of a conversation is an instruction, everything before it the prompt. The document is
the conversation. Long ones were cut for training into rows whose ids end in the place of the cut,
as in QWJhYvA_0 and QWJhYvA_14: these stay together. A cut one may begin with a reply whose question
stands in another row; that reply is left out, and so is a last question that nobody answered.
"""

import re
from collections import Counter
from collections.abc import Iterator

from pipeline.data.adapters.turns import (
    NO_QUESTION,
    NO_REPLY,
    Message,
    UnusableError,
    first_question,
    joined,
    messages_in,
    row_of,
)
from pipeline.data.tables import Row

COLUMNS = "conversations, a list of turns {from, value}, and perhaps id"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
FIRST_REPLY = "turns left out: a reply before the first question"
LAST_QUESTION = "turns left out: a last question without a reply"

_PIECE = re.compile(r"(?=[a-z]*[A-Z0-9])([A-Za-z0-9]{7})_\d+")
"""An id of ShareGPT, seven random letters and digits, with the place of a cut; not `example_1`."""


def rows(row: Row, row_type: str, dropped: Counter[str]) -> Iterator[Row]:
    """Returns the conversation as text, every reply as an instruction, every question as a prompt.

    Args:
        row: one row of the data set.
        row_type: text, instructions or prompts.
        dropped: counts the turns that are left out.
    """
    turns = messages_in(row, "conversations", speaker="from", said="value", roles=ROLES)
    messages = _from_a_question(joined(turns), dropped)
    group = _conversation(row.get("id")) or first_question(messages)
    if messages[-1]["role"] == "user" and row_type != "prompts":
        dropped[LAST_QUESTION] += 1
        messages = messages[:-1]
    last = "user" if row_type == "prompts" else "assistant"
    places = [place for place, message in enumerate(messages) if message["role"] == last]
    if not places:
        raise UnusableError(NO_REPLY)
    for place in places[-1:] if row_type == "text" else places:
        yield row_of(row_type, messages[: place + 1], group=group)


def _from_a_question(messages: list[Message], dropped: Counter[str]) -> list[Message]:
    """Returns the conversation without a reply that comes before the user's first turn."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system) :]
    if rest and rest[0]["role"] == "assistant":
        dropped[FIRST_REPLY] += 1
        rest = rest[1:]
    if not rest:
        raise UnusableError(NO_QUESTION)
    return [*system, *rest]


def _conversation(key: object) -> str:
    """Returns the id of the whole conversation, empty where there is none."""
    name = str(key) if isinstance(key, str | int) else ""
    piece = _PIECE.fullmatch(name)
    return piece[1] if piece else name
