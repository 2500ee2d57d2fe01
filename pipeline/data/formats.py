"""The row types, one Parquet file each per split, and the checks every row passes.

    text               {"messages": [{"role", "content"}, ...]} or {"text"}
    instructions       {"prompt", "completion"}; a {"messages"} row is cut before its last message
    prompts            {"prompt"}
    preferences        {"prompt", "chosen", "rejected", "margin"?}, or rankings
                       {"prompts": [one], "set", "ids", "responses", "scores", "ratings"}
    guard_preferences  the same, for a second reward model that only judges

A prompt is a string or a list of messages that ends with the user's; a completion, chosen or
rejected reply is a string or the assistant's message in a list of one. Every row has a `group`
(conversation, document or text); in rankings of the recipe it is the name of the set. Where none is
given it is what the user said first, in lower case and words only, so that a question is one group
in every row type and schema. Lines and spaces within a text stay as they are.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.adapters.turns import first_question
from pipeline.data.cleaning import normalise, tidy
from pipeline.data.tables import FORMS, Row, parquet_rows, stage_rows
from pipeline.errors import UserError

ROLES = ("system", "user", "assistant")

LARGEST = 10**9
"""Largest score, rating or margin: differences of such stay finite in every precision."""


def rows_file(folder: Path, row_type: str, *, split: str) -> Path:
    """Where the rows of one type and split lie in a data folder."""
    return folder / f"{row_type}-{split}.parquet"


def read_rows(folder: Path, row_type: str, *, split: str) -> list[Row]:
    """Returns the rows of one type and split, all at once.

    Raises:
        UserError: as `iterate_rows`.
    """
    return list(iterate_rows(folder, row_type, split=split))


def iterate_rows(folder: Path, row_type: str, *, split: str) -> Iterator[Row]:
    """Returns the rows of one type and split, few of which are in memory at one time.

    Raises:
        UserError: the data folder has no such rows, or they are damaged.
    """
    path = rows_file(folder, row_type, split=split)
    if not path.is_file():
        raise UserError(f"{folder} has no {row_type} rows for {split}: configure them for data")
    return stage_rows(path, row_type) if row_type in FORMS else parquet_rows(path)


def check_row(row: Any, row_type: str, *, where: str) -> Row:
    """Returns the row in the form its Parquet file holds, texts tidied, other columns left out.

    Args:
        row: what the user's file holds on one line.
        row_type: one of the types above.
        where: file and line, for the message.

    Raises:
        UserError: a column is missing, of the wrong type, or empty.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with columns, got {type(row).__name__}")
    build = {
        "text": _text,
        "instructions": _instruction,
        "prompts": _prompt,
    }.get(row_type, _preference)
    try:
        checked = build(row)
        checked["group"] = _label(row.get("group"), "group") or _document(checked)
    except _BadRowError as error:
        raise UserError(f"{where}: {error}") from None
    return checked


def _document(row: Row) -> str:
    """Names the document of a row as the schemas do; one system message opens many of them."""
    if "text" in row:
        return str(row["text"])
    prompt: Any = row["prompts"][0] if "prompts" in row else row.get("messages", row.get("prompt"))
    if isinstance(prompt, str):
        return normalise(prompt)
    return first_question(prompt) or texts_of(prompt)[-1]


def texts_of(value: Any) -> list[str]:
    """Returns the texts of a string or of a list of messages."""
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def row_texts(row: Row) -> list[str]:
    """Returns every text of a row of any type."""
    names = ("messages", "text", "prompt", "completion", "chosen", "rejected")
    texts = [text for name in names if name in row for text in texts_of(row[name])]
    prompts = [text for prompt in row.get("prompts", []) for text in texts_of(prompt)]
    return [*prompts, *texts, *row.get("responses", [])]


def replies_of(row: Row) -> list[str]:
    """Returns the replies of a row of preferences: a ranking's, or a pair's."""
    pair = [text for name in ("chosen", "rejected") if name in row for text in texts_of(row[name])]
    return [*row.get("responses", []), *pair]


class _BadRowError(ValueError):
    """What is wrong with a row, without the place."""


def _text(row: Row) -> Row:
    if "messages" in row:
        return {"messages": _messages(row["messages"], "messages")}
    return {"text": _string(row, "text")}


def _instruction(row: Row) -> Row:
    if "messages" in row and "prompt" not in row:
        messages = _messages(row["messages"], "messages")
        if len(messages) < 2:
            raise _BadRowError("messages must hold a prompt and the reply to it")
        return _instruction({"prompt": messages[:-1], "completion": messages[-1:]})
    return {"prompt": _prompt_value(row, "prompt"), "completion": _reply(row, "completion")}


def _prompt(row: Row) -> Row:
    return {"prompt": _prompt_value(row, "prompt")}


def _preference(row: Row) -> Row:
    if "responses" in row:
        return _ranking(row)
    pair: Row = {"prompt": _prompt_value(row, "prompt")}
    pair |= {name: _reply(row, name) for name in ("chosen", "rejected")}
    if pair["chosen"] == pair["rejected"]:
        raise _BadRowError("chosen and rejected are the same text")
    if row.get("margin") is not None:
        pair["margin"] = _number(row["margin"], "margin")
    return pair


def _ranking(row: Row) -> Row:
    prompts = row["prompts"] if "prompts" in row else [row.get("prompt")]
    if not isinstance(prompts, list) or len(prompts) != 1:
        raise _BadRowError("a ranking has one prompt")
    responses, scores = row["responses"], row.get("scores")
    if not isinstance(responses, list) or len(responses) < 2:
        raise _BadRowError("responses must be a list of at least two texts")
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise _BadRowError("scores must be a list as long as responses")
    ids = row.get("ids") or list(range(len(responses)))
    ratings = row.get("ratings") or [[] for _ in responses]
    for given in (ids, ratings):
        if not isinstance(given, list) or len(given) != len(responses):
            raise _BadRowError("ids and ratings must be lists as long as responses")
    return {
        "prompts": [_prompt_value({"prompt": prompts[0]}, "prompt")],
        "set": _label(row.get("set"), "set") or "own",
        "ids": [_label(key, "ids") for key in ids],
        "responses": [_string({"response": text}, "response") for text in responses],
        "scores": [_number(score, "scores") for score in scores],
        "ratings": [_ratings(given) for given in ratings],
    }


def _ratings(given: Any) -> list[int]:
    if not isinstance(given, list):
        raise _BadRowError("ratings must hold a list for each of the responses")
    numbers = [_number(value, "ratings") for value in given]
    broken = [number for number in numbers if not number.is_integer()]
    if broken:
        raise _BadRowError(f"ratings must be whole numbers, got {broken[0]!r}; multiply them all")
    return [int(number) for number in numbers]


def _prompt_value(row: Row, name: str) -> str | list[dict[str, str]]:
    if not isinstance(row.get(name), list):
        return _string(row, name)
    messages = _messages(row[name], name)
    if messages[-1]["role"] != "user":
        raise _BadRowError(f"{name} must end with a message of the user")
    return messages


def _reply(row: Row, name: str) -> str | list[dict[str, str]]:
    value = [row[name]] if isinstance(row.get(name), dict) else row.get(name)
    if not isinstance(value, list):
        return _string(row, name)
    messages = _messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise _BadRowError(f"{name} must be a text or one message of the assistant")
    return messages


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _BadRowError(f"{name} must be a list of messages, and not empty")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _BadRowError(f"a message of {name} needs a role of {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _string(message, "content")})
    return messages


def _string(row: Row, name: str) -> str:
    value = row.get(name)
    if name not in row or value is None:
        raise _BadRowError(f"{name} is missing")
    if not isinstance(value, str):
        raise _BadRowError(f"{name} must be a text, got {type(value).__name__}")
    if not (text := tidy(value)):
        raise _BadRowError(f"{name} is empty")
    return text


def _label(value: Any, name: str) -> str:
    """A name or number of a group, a set or a text; empty where there is none.

    Tables hold what is missing as NaN where the others are numbers.
    """
    if value is None or value != value:  # noqa: PLR0124 - so is NaN alone
        return ""
    if not isinstance(value, str | int | float):
        raise _BadRowError(f"{name} must be a text or a number, got {type(value).__name__}")
    return tidy(str(value))


def _number(value: Any, name: str) -> float:
    """A finite number within LARGEST; CSV cells come as text."""
    try:
        number = float("no number" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise _BadRowError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        number = 2.0 * LARGEST  # too long for a float, whatever its sign
    if not math.isfinite(number):
        raise _BadRowError(f"{name} must be finite, got {value!r}")
    if abs(number) > LARGEST:
        raise _BadRowError(f"{name} must be between ±{LARGEST:,}, got {value!r}")
    return number
