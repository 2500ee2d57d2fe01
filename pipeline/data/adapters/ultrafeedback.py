"""HuggingFaceH4/ultrafeedback_binarized: two conversations as messages, and their scores.

    {"prompt": text, "prompt_id": text, "chosen": [{"role", "content"}, ...], "rejected": [...],
     "messages": [...], "score_chosen": number, "score_rejected": number}

Scores are optional here: other data sets share the rest of the schema. Their difference becomes
the margin. The document is the prompt.
"""

import math
from collections.abc import Iterator

from pipeline.data.adapters.turns import (
    Message,
    UnusableError,
    column,
    first_question,
    messages_in,
    pair_of,
    row_of,
)
from pipeline.data.tables import Row

COLUMNS = "chosen and rejected, lists of messages {role, content}; score_chosen, score_rejected"
ROLES = {"user": "user", "assistant": "assistant", "system": "system"}


def rows(row: Row, row_type: str) -> Iterator[Row]:
    """Returns the pair, or the chosen conversation where no preferences are wanted."""
    chosen = _messages(row, "chosen")
    group = first_question(chosen)
    if row_type in ("preferences", "guard_preferences"):
        rejected = _messages(row, "rejected")
        yield pair_of(chosen, rejected, group=group, margin=_margin(row))
    else:
        yield row_of(row_type, chosen, group=group)


def _messages(row: Row, name: str) -> list[Message]:
    return messages_in(row, name, speaker="role", said="content", roles=ROLES)


def _margin(row: Row) -> float | None:
    """By how much the chosen reply scores higher; None where a score is missing."""
    names = [name for name in ("score_chosen", "score_rejected") if name in row]
    scores = [column(row, name, int | float, called="a number") for name in names]
    known = [float(score) for score in scores if score is not None and math.isfinite(score)]
    if len(known) < 2:
        return None
    if known[0] <= known[1]:
        raise UnusableError("the chosen reply scores no higher than the rejected one")
    return known[0] - known[1]
