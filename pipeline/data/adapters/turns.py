"""What every adapter builds on: turns become messages, and messages become rows of a type."""

from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any

from pipeline.data.cleaning import normalise, tidy
from pipeline.data.tables import Row

Message = dict[str, str]

NO_REPLY = "no final reply"
NO_QUESTION = "no turn of the user before the reply"
EMPTY = "an empty turn"
SAME = "chosen and rejected are the same text"
OTHER_PROMPT = "chosen and rejected answer different prompts"


class UnusableError(Exception):
    """Why a row of the right schema is dropped: the reason it is counted under."""


class WrongSchemaError(Exception):
    """What shows that a row is not of the schema; where it stands, if the adapter knows better."""

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(message)
        self.where = where


def column(row: Row, name: str, kind: type | UnionType, *, called: str) -> Any:
    """Returns a column's value of the kind that the schema has there, None where it is null.

    Raises:
        WrongSchemaError: there is no such column, or it holds another kind.
    """
    if name not in row:
        raise WrongSchemaError(f"{name} is missing")
    value = row[name]
    if value is not None and not isinstance(value, kind):
        raise WrongSchemaError(f"{name} must be {called}, got {type(value).__name__}")
    return value


def text_of(row: Row, name: str) -> str:
    """Returns a column of text, tidied; empty where it is null."""
    return tidy(column(row, name, str, called="a text") or "")


def messages_in(
    row: Row, name: str, *, speaker: str, said: str, roles: dict[str, str]
) -> list[Message]:
    """Returns a column that lists turns as messages, empty turns among them.

    Args:
        row: a row of the data set.
        name: the column.
        speaker: key of a turn that says who speaks.
        said: key of a turn that holds its text.
        roles: role of each speaker that the schema knows.

    Raises:
        WrongSchemaError: the column is no list of such turns.
        UnusableError: somebody else speaks, such as a tool.
    """
    turns = column(row, name, list, called=f"a list of turns {{{speaker}, {said}}}") or []
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {speaker, said} <= turn.keys():
            raise WrongSchemaError(f"a turn of {name} needs {speaker} and {said}")
        who = column(turn, speaker, str, called="a text")
        if who not in roles:
            raise UnusableError(f"a turn of another speaker than {', '.join(roles)}")
        messages.append({"role": roles[who], "content": text_of(turn, said)})
    return messages


def joined(messages: Iterable[Message]) -> list[Message]:
    """Returns a conversation whose speakers alternate, its system message first if it has one.

    Consecutive turns of one speaker become one, a blank line between them; an empty system
    message is none.

    Raises:
        UnusableError: a turn is empty, or a system message stands inside.
    """
    made: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            if made and made[-1]["role"] != "system":
                raise UnusableError("a system message inside the conversation")
            if not message["content"]:
                continue
        if not message["content"]:
            raise UnusableError(EMPTY)
        if made and made[-1]["role"] == message["role"]:
            content = f"{made[-1]['content']}\n\n{message['content']}"
            made[-1] = {"role": message["role"], "content": content}
        else:
            made.append(message)
    return made


def parted(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """Returns the prompt, which ends with the user's turn, and the final reply to it.

    Raises:
        UnusableError: there is no reply at the end, or nothing that it answers, or a turn is empty.
    """
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UnusableError(NO_REPLY)
    *prompt, reply = joined(messages)
    if not prompt or prompt[-1]["role"] != "user":
        raise UnusableError(NO_QUESTION)
    return prompt, reply["content"]


def asked(messages: Sequence[Message]) -> list[Message]:
    """Returns the conversation up to the user's last turn, whether it was answered or not.

    Raises:
        UnusableError: the user says nothing, or a turn is empty.
    """
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise UnusableError(NO_QUESTION)
    return joined(messages[: users[-1] + 1])


def row_of(row_type: str, messages: Sequence[Message], *, group: str) -> Row:
    """Returns a conversation as a row of text, instructions or prompts.

    Raises:
        UnusableError: it has no final reply where one is needed, or a turn is empty.
    """
    if row_type == "prompts":
        return {"prompt": asked(messages), "group": group}
    prompt, reply = parted(messages)
    answer = {"role": "assistant", "content": reply}
    if row_type == "text":
        return {"messages": [*prompt, answer], "group": group}
    return {"prompt": prompt, "completion": [answer], "group": group}


def pair_of(
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    *,
    group: str,
    margin: float | None = None,
) -> Row:
    """Returns two conversations that differ in their last reply as a row of preferences.

    Raises:
        UnusableError: they differ before, not at all, or one has no final reply.
    """
    (prompt, better), (other, worse) = parted(chosen), parted(rejected)
    if prompt != other:
        raise UnusableError(OTHER_PROMPT)
    if better == worse:
        raise UnusableError(SAME)
    replies = {"chosen": better, "rejected": worse}
    row: Row = {name: [{"role": "assistant", "content": reply}] for name, reply in replies.items()}
    return row | {"prompt": prompt, "margin": margin, "group": group}


def first_question(messages: Iterable[Message]) -> str:
    """Returns the user's first turn as a name of the conversation: what grows from it is one."""
    texts = (message["content"] for message in messages if message["role"] == "user")
    return normalise(next(texts, ""))
