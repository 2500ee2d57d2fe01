r"""Anthropic/hh-rlhf: two transcripts that differ in their last reply.

    {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "\n\nHuman: ...\n\nAssistant: ..."}

Conversations grow: the prompt of one row is often the beginning of another's. So rows that begin
with the same question are one document.
"""

import re
from collections.abc import Iterator

from pipeline.data.adapters.turns import (
    Message,
    WrongSchemaError,
    first_question,
    pair_of,
    row_of,
    text_of,
)
from pipeline.data.cleaning import tidy
from pipeline.data.tables import Row

COLUMNS = "chosen and rejected, transcripts of turns that begin with 'Human:' or 'Assistant:'"
ROLES = {"Human": "user", "Assistant": "assistant"}

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""The beginning of a turn; only what stands behind a blank line begins one."""


def rows(row: Row, row_type: str) -> Iterator[Row]:
    """Returns the pair, or the chosen conversation where no preferences are wanted."""
    chosen = _transcript(row, "chosen")
    group = first_question(chosen)
    if row_type in ("preferences", "guard_preferences"):
        yield pair_of(chosen, _transcript(row, "rejected"), group=group)
    else:
        yield row_of(row_type, chosen, group=group)


def _transcript(row: Row, name: str) -> list[Message]:
    before, *parts = _TURN.split(text_of(row, name))
    if before or not parts:
        raise WrongSchemaError(f"{name} does not begin with 'Human:' or 'Assistant:'")
    speakers, texts = parts[::2], parts[1::2]
    return [
        {"role": ROLES[speaker], "content": tidy(text)}
        for speaker, text in zip(speakers, texts, strict=True)
    ]
