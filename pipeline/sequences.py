"""Prompts and responses as tensors: right-padded batches and the policy's log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompt + response rows, padded on the right.

    Attributes:
        input_ids: token ids; pad_id outside attention_mask.
        attention_mask: True on real tokens.
        position_ids: 0, 1, 2, … from the cumulative mask; 0 on padding.
        response_mask: True on response tokens (EOS included).
    """

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]

    def inputs(self) -> dict[str, Tensor]:
        """Returns the keyword arguments of a transformers model's forward."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask.long(),
            "position_ids": self.position_ids,
        }

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, pad_id: int
) -> Batch:
    """Returns rows of prompt + response tokens padded on the right to the longest row."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    response_mask = torch.zeros_like(mask)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
        response_mask[index, len(prompt) : len(row)] = True
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0) * mask
    return Batch(ids, mask, positions, response_mask)


def response_states(model: Any, batch: Batch) -> Float[Tensor, "token width"]:
    """Returns the last hidden state before each response token, so that heads run on those only.

    Rows come in row-major order of `batch.response_mask`.
    """
    hidden = model.base_model(**batch.inputs(), use_cache=False).last_hidden_state
    states: Tensor = hidden[:, :-1][batch.response_mask[:, 1:]]
    return states


def next_logits(
    model: Any,
    states: Float[Tensor, "token width"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "token vocabulary"]:
    """Returns the logits after each state, divided by the temperature, float32 or wider."""
    logits = model.get_output_embeddings()(states)
    return wide(logits) / temperature


def wide(values: Tensor) -> Tensor:
    """Returns floats in float32, or as they are where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pad_tokens(
    values: Float[Tensor, "token"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Returns per-token values put at the mask's True positions, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )


def next_logprobs(
    model: Any,
    states: Float[Tensor, "token width"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "token vocabulary"]:
    """Returns log pi over the whole vocabulary after each state."""
    return next_logits(model, states, temperature=temperature).log_softmax(dim=-1)


def chosen_logprobs(
    logprobs: Float[Tensor, "token vocabulary"], batch: Batch
) -> Float[Tensor, "token"]:
    """Returns the log-probability of each response token that was written."""
    return logprobs.gather(1, batch.input_ids[batch.response_mask][:, None])[:, 0]


def token_entropy(logprobs: Float[Tensor, "token vocabulary"]) -> Float[Tensor, "token"]:
    """Returns -sum p log p of each token's distribution, in nats."""
    return -(logprobs.exp() * logprobs).sum(dim=-1)
