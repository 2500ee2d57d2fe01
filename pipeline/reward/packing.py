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
    ids = torch.full((len(rows), width), pad_id)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    owner = torch.full((len(rows), width), len(texts))
    last = torch.zeros((len(texts), 2), dtype=torch.long)
    for number, row in enumerate(rows):
        prompt = list(prompts[row[0]])
        end = len(prompt)
        ids[number, :end], positions[number, :end] = torch.tensor(prompt), torch.arange(end)
        owner[number, :end] = -1
        for index in row:
            part = slice(end, end := end + len(texts[index]))
            ids[number, part] = torch.tensor(list(texts[index]))
            positions[number, part] = torch.arange(len(texts[index])) + len(prompt)
            owner[number, part] = index
            last[index] = torch.tensor([number, end - 1])
    return Packed(ids, positions, _visible(owner)[:, None], last)


def padding_frac(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> float:
    """Returns the share of positions that hold no token when `pack_texts` packs these."""
    rows, width = _tightest(prompts, texts)
    num_tokens = sum(len(prompts[row[0]]) for row in rows) + sum(map(len, texts))
    return 1 - num_tokens / (len(rows) * width)


def _tightest(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], int]:
    """Returns the indices of the texts of each row, and the length of the longest row."""

    def width(rows: list[list[int]]) -> int:
        return max(len(prompts[row[0]]) + sum(len(texts[index]) for index in row) for row in rows)

    lengths = range(ROW_TOKENS, (ROW_TOKENS * 2 - 1) // 3, -STEP_TOKENS)
    tried = (_fill(prompts, texts, row_tokens=length) for length in lengths)
    found = ((rows, width(rows)) for rows in tried)
    return min(found, key=lambda one: len(one[0]) * one[1])


def _fill(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, row_tokens: int
) -> list[list[int]]:
    """Returns the indices of the texts of each row: first fit, longest first."""
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        prompt, size = prompts[index], len(texts[index])
        fitting = (
            number
            for number, row in enumerate(rows)
            if left[number] >= size and prompts[row[0]] == prompt
        )
        number = next(fitting, len(rows))
        if number == len(rows):
            rows.append([])
            left.append(row_tokens - len(prompt))
        rows[number].append(index)
        left[number] -= size
    return rows


def _visible(owner: Int[Tensor, "row time"]) -> Bool[Tensor, "row time time"]:
    """Returns what a token sees: itself and, before it, its own text and the prompt (owner -1)."""
    time = owner.shape[1]
    before = torch.ones(time, time, dtype=torch.bool).tril()
    own = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1)
    return own & before
