"""Prompts and responses as tensors: right-padded batches and the policy's log-probabilities."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.attention import packed_inputs
from pipeline.heads import logits_head
from pipeline.last_layer import only
from pipeline.logprobs import picked, wide
from pipeline.sizes import filled_up
from pipeline.stepping import taken

PIECE_TOKENS = 1024
"""Tokens whose logits exist at a time: 200 MB in float32 for a vocabulary of 50,000."""


@dataclass(frozen=True)
class Batch:
    """Prompt + response rows, padded on the right; or packed: end to end in a single row.

    Attributes:
        input_ids: token ids; pad_id outside attention_mask.
        attention_mask: True on real tokens.
        position_ids: 0, 1, 2, … from the cumulative mask; 0 on padding.
        response_mask: True on response tokens (EOS included).
        row_lengths: tokens of each row where they are packed; empty where they are padded.
    """

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]
    row_lengths: tuple[int, ...] = ()

    def inputs(self) -> dict[str, Any]:
        """Returns the keyword arguments of a transformers model's forward."""
        if self.row_lengths:
            return packed_inputs(self.input_ids, self.position_ids, self.row_lengths)
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask.long(),
            "position_ids": self.position_ids,
        }

    def last(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Returns where the last real token of each row of prompt + response stands."""
        if self.row_lengths:
            ends = torch.tensor(self.row_lengths, device=self.input_ids.device).cumsum(0) - 1
            return torch.zeros_like(ends), ends
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        ends = torch.where(self.attention_mask, columns, -1).amax(dim=1)  # padding on any side
        return torch.arange(len(ends), device=ends.device), ends

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.response_mask.to(device),
            self.row_lengths,
        )


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    packed: bool = False,
) -> Batch:
    """Returns rows of prompt + response tokens padded on the right to the longest row.

    Args:
        prompts: token ids, none empty.
        responses: token ids.
        pad_id: fills the rows up.
        packed: puts the rows end to end instead, for models that read them so
            (`pipeline.attention`).
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(row) for row in rows]
    width = max(lengths)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    response_mask = torch.zeros_like(mask)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
        response_mask[index, len(prompt) : len(row)] = True
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0) * mask
    batch = Batch(ids, mask, positions, response_mask)
    return _packed(batch, tuple(lengths)) if packed else batch


def _packed(padded: Batch, lengths: tuple[int, ...]) -> Batch:
    """Returns the real tokens end to end."""
    ids, positions, response_mask = (
        tensor[padded.attention_mask][None]
        for tensor in (padded.input_ids, padded.position_ids, padded.response_mask)
    )
    return Batch(ids, torch.ones_like(response_mask), positions, response_mask, lengths)


def response_states(model: Any, batch: Batch) -> Float[Tensor, "token width"]:
    """Returns the last hidden state before each response token, so that heads run on those only.

    Rows come in row-major order of `batch.response_mask`.
    """
    before = batch.response_mask.roll(-1, dims=1)
    before[:, -1] = False
    return states_at(model, batch, before)


def by_length(lengths: Sequence[int], *, batch_size: int, mixed: bool = True) -> list[list[int]]:
    """Returns the rows of every batch, in the order of their lengths.

    Args:
        lengths: of the rows.
        batch_size: most rows of a batch.
        mixed: whether a batch may hold rows of several lengths.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    groups = [order] if mixed else [list(rows) for _, rows in groupby(order, lengths.__getitem__)]
    return [
        rows[start : start + batch_size]
        for rows in groups
        for start in range(0, len(rows), batch_size)
    ]


def states_at(
    model: Any, batch: Batch, wanted: Bool[Tensor, "batch time"]
) -> Float[Tensor, "token width"]:
    """Returns the last hidden states where wanted is True, in row-major order."""
    inputs = taken(model, batch.inputs())
    length = inputs["input_ids"].shape[1]
    packed = only(wanted[0].nonzero()[:, 0], length=length) if batch.row_lengths else nullcontext()
    with packed:
        hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, : wanted.shape[1]][wanted]


def text_logprobs(model: Any, ids: Int[Tensor, "row time"]) -> Float[Tensor, "row later"]:
    """Returns log pi of each token of rows of text but the first, given those before it.

    Every token is real; logits come in pieces, as those of responses do.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logprobs = token_logprobs(model, hidden.flatten(0, 1), ids[:, 1:].flatten())
    return logprobs.view(len(ids), -1)


def next_logits(
    model: Any,
    states: Float[Tensor, "token width"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "token vocabulary"]:
    """Returns the logits after each state, divided by the temperature, float32 or wider."""
    logits = logits_head(model)(states)
    return wide(logits) / temperature


def pad_tokens(
    values: Float[Tensor, "token"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Returns per-token values put at the mask's True positions, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )


def token_logprobs(
    model: Any,
    states: Float[Tensor, "token width"],
    tokens: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " token"]:
    """Returns log pi of each token after its state."""

    def figures(states: Tensor, tokens: Tensor) -> tuple[Tensor]:
        logits = logits_head(model)(states)
        return (picked(logits, tokens, temperature=temperature)[0],)

    return _in_pieces(figures, states, tokens)[0]


def token_logprobs_and_entropy(
    model: Any,
    states: Float[Tensor, "token width"],
    tokens: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Returns log pi of each token after its state, and -sum p log p there, in nats."""

    def figures(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_head(model)(states)
        chosen, entropies = picked(logits, tokens, temperature=temperature, entropy=True)
        assert entropies is not None
        return chosen, entropies

    chosen, entropy = _in_pieces(figures, states, tokens)
    return chosen, entropy


def _in_pieces(
    figures: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    states: Float[Tensor, "token width"],
    tokens: Int[Tensor, " token"],
) -> list[Float[Tensor, " token"]]:
    """Returns figures of all tokens without the logits of all of them at once.

    They come piece by piece, and so do their gradients, for which each piece is computed again:
    what is held does not grow with the number of tokens times the vocabulary.
    """
    count, states, tokens = len(tokens), filled_up(states), filled_up(tokens)
    if len(states) <= PIECE_TOKENS:
        return [column[:count] for column in figures(states, tokens)]
    parts = [
        checkpoint(figures, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(states.split(PIECE_TOKENS), tokens.split(PIECE_TOKENS), strict=True)
    ]
    return [torch.cat(column)[:count] for column in zip(*parts, strict=True)]


def next_logprobs(
    model: Any,
    states: Float[Tensor, "token width"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "token vocabulary"]:
    """Returns log pi over the whole vocabulary after each state."""
    return next_logits(model, states, temperature=temperature).log_softmax(dim=-1)


def response_tokens(batch: Batch) -> Int[Tensor, " token"]:
    """Returns the response tokens, in the order of `response_states`."""
    return batch.input_ids[batch.response_mask]
