"""Texts of a ranking side by side in few rows, each seeing its prompt and itself alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ROW_TOKENS = 192
"""Most tokens to which rows are filled: long enough to waste little, short enough that attention,
which grows with its square, stays cheap. 96 to 256 take about the same time."""
STEP_TOKENS = 8
"""Shorter rows are tried, down to two thirds, a step at a time: the last row of a ranking is as
wide as the others, so that some lengths leave more of it empty than others."""

PROMPT = -1
"""Owner of a prompt's tokens; a text's is its index."""


@dataclass(frozen=True)
class Packed:
    """Rows that begin with a prompt, followed by texts that answer it.

    Attributes:
        input_ids: token ids; pad_id behind the last text.
        position_ids: each token's place in its own prompt + text.
        attention_mask: True where a token (third axis) sees another (fourth axis).
        last: row and column of each text's last token, in the order the texts were given.
    """

    input_ids: Int[Tensor, "row time"]
    position_ids: Int[Tensor, "row time"]
    attention_mask: Bool[Tensor, "row 1 time time"]
    last: Int[Tensor, "text 2"]

    def inputs(self) -> dict[str, Tensor]:
        """Returns the rows by the names of a transformers model's forward; the mask is Boolean."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }


def pack_texts(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, pad_id: int
) -> Packed:
    """Returns the texts in rows, long ones first, each in the first row of its prompt with room.

    Rows have the length, of some tried ones, that makes the fewest positions.
    What a model computes for a text is what it computes for prompt + text alone: no text sees
    another one, and positions count from the prompt.

    Args:
        prompts: token ids of each text's prompt.
        texts: token ids of each text, of at least one token.
        pad_id: token id that fills the rows up.
    """
    rows, width = _tightest(prompts, texts)
    ids, positions, owners = [], [], []
    last = torch.zeros((len(texts), 2), dtype=torch.long)
    for number, row in enumerate(rows):
        start = len(prompts[row[0]])
        tokens, places, owner = [*prompts[row[0]]], [*range(start)], [PROMPT] * start
        for index in row:
            size = len(texts[index])
            tokens += texts[index]
            places += range(start, start + size)
            owner += [index] * size
            last[index, 0], last[index, 1] = number, len(tokens) - 1
        missing = width - len(tokens)
        ids.append(tokens + [pad_id] * missing)
        positions.append(places + [0] * missing)
        owners.append(owner + [len(texts)] * missing)
    visible = _visible(torch.tensor(owners))[:, None]
    return Packed(torch.tensor(ids), torch.tensor(positions), visible, last)


def padding_frac(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> float:
    """Returns the share of positions that hold no token when `pack_texts` packs these."""
    rows, width = _tightest(prompts, texts)
    num_tokens = sum(len(prompts[row[0]]) for row in rows) + sum(map(len, texts))
    return 1 - num_tokens / (len(rows) * width)


def _tightest(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], int]:
    """Returns the indices of the texts of each row, and the length of the longest row."""
    sizes = [len(text) for text in texts]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(texts)), key=lambda index: -sizes[index]):
        groups.setdefault(tuple(prompts[index]), []).append(index)

    def tried(row_tokens: int) -> tuple[list[list[int]], int]:
        rows, width = [], 0
        for prompt, indices in groups.items():
            own, least_room = _fill(indices, sizes, room=row_tokens - len(prompt))
            rows += own
            width = max(width, row_tokens - least_room)
        return rows, width

    lengths = range(ROW_TOKENS, (ROW_TOKENS * 2 - 1) // 3, -STEP_TOKENS)
    return min(map(tried, lengths), key=lambda one: len(one[0]) * one[1])


def _fill(
    indices: Sequence[int], sizes: Sequence[int], *, room: int
) -> tuple[list[list[int]], int]:
    """Returns the indices of each row, first fit, and the least room that a row has left.

    A text that is longer than the room has a row of its own, where less than none is left.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in indices:
        size = sizes[index]
        for number, free in enumerate(left):
            if free >= size:
                rows[number].append(index)
                left[number] -= size
                break
        else:
            rows.append([index])
            left.append(room - size)
    return rows, min(left)


def _visible(owner: Int[Tensor, "row time"]) -> Bool[Tensor, "row time time"]:
    """Returns what a token sees: itself and, before it, its own text and the prompt."""
    time = owner.shape[1]
    before = torch.ones(time, time, dtype=torch.bool).tril()
    own = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == PROMPT)
    return own & before
