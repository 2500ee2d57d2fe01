"""Files of prompts in, files of replies out, for generation in bulk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

Prompt = str | list[dict[str, str]]


def prompt_text(prompt: Prompt) -> str:
    """Returns a prompt as text for people: a conversation has a line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def read_prompts(path: Path) -> list[Prompt]:
    """Returns the prompts of a file: one a line as text, or `{"prompt": ...}` rows in JSON Lines.

    Args:
        path: a .jsonl file whose rows hold `prompt` (text or messages) or `messages`, or any other
            text file with one prompt a line; empty lines are skipped.

    Raises:
        UserError: missing file, a malformed row (its line is named), or no prompt at all.
    """
    if not path.is_file():
        raise UserError(f"generate.prompts: no such file: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [line.strip() for _, line in numbered]
    return [_parse(line, where=f"{path}, line {number}") for number, line in numbered]


def write_replies(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows as JSON Lines, under a temporary name first so that no half file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(line: str, *, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    prompt = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise UserError(
        f"{where}: needs `prompt`, a text or a list of messages with `role` and `content`"
    )


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
