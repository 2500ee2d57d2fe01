"""Files of prompts in, files of replies out, for generation in bulk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.formats import check_row
from pipeline.errors import UserError
from pipeline.storage import parse_json, text_lines

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
        UserError: missing file, a row that the data stage would refuse too (its line is named), or
            no prompt at all.
    """
    if not path.is_file():
        raise UserError(f"generate.prompts: no such file: {path}")
    lines = [(where, line) for where, line in text_lines(path) if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [line.strip() for _, line in lines]
    return [_parse(line, where=where) for where, line in lines]


def check_output(path: Path, *, prompts: Path) -> None:
    """Makes the folder of a file of replies and tries to write there, before any could be lost.

    Raises:
        UserError: the file is a folder, or the file of prompts itself, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"generate.output: {path} is a folder; name a file in it")
    if path.exists() and prompts.exists() and path.samefile(prompts):
        raise UserError(f"generate.output: would replace the prompts, {prompts}; name another file")
    trial = _partial(path).with_name(f"{_partial(path).name}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"generate.output: {path} cannot be written ({error.strerror}); name another file"
        ) from error


def write_replies(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows as JSON Lines, under a temporary name first so that no half file remains."""
    temporary = _partial(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _parse(line: str, *, where: str) -> Prompt:
    row = parse_json(line, where=where)
    prompt: Any = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if prompt is None:
        raise UserError(
            f"{where}: needs `prompt`, a text or a list of messages with `role` and `content`"
        )
    checked: Prompt = check_row({"prompt": prompt}, "prompts", where=where)["prompt"]
    return checked
