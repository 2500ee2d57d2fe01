"""Divergence and likelihood of responses, summed over each response's tokens in float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.attention import is_packed
from pipeline.parallel import side_by_side
from pipeline.ppo.kl import full_kl
from pipeline.sequences import (
    PIECE_TOKENS,
    Batch,
    by_length,
    collate,
    next_logprobs,
    response_states,
    response_tokens,
    token_logprobs,
)

TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of a policy from its reference on the policy's own responses, in nats."""

    kl: Float[Tensor, " row"]
    """Sum over tokens of the full-vocabulary KL(policy || reference)."""
    k1: Float[Tensor, " row"]
    """Sum over tokens of log policy - log reference at the token that was sampled."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How rows are put together: the id that fills them up, rows of a pass, passes side by side."""

    pad_id: int
    batch_size: int
    workers: int = 1


def divergence(
    policy: Any,
    *,
    reference: Any,
    prompts: TokenIds,
    responses: TokenIds,
    batching: Batching,
) -> Divergence:
    """Returns the divergence of the policy from the reference, response by response.

    Args:
        policy: the model that wrote the responses, at temperature 1, or a role that reads through
            one. Two roles on one base take `batching.workers` 1: each switches what it reads by.
        reference: the same of what it is held against; same vocabulary.
        prompts: token ids, one list a row.
        responses: token ids, one list a row, EOS included where the response ended.
        batching: how the rows are put together.
    """
    packed = is_packed(policy) and is_packed(reference)

    def figures(ours: Tensor, theirs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = next_logprobs(policy, ours), next_logprobs(reference, theirs)
        return full_kl(ours, theirs), (ours - theirs).gather(1, tokens)[:, 0]

    def apart(batch: Batch) -> list[Tensor]:
        tokens = response_tokens(batch).to(policy.device)[:, None]
        columns = (_states(policy, batch), _states(reference, batch), tokens)
        pieces = zip(*(column.split(PIECE_TOKENS) for column in columns), strict=True)
        found = [figures(*piece) for piece in pieces]
        return [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]

    kl, k1 = _summed(apart, prompts, responses, batching=batching, packed=packed)
    return Divergence(kl=kl, k1=k1)


def negative_log_likelihood(
    model: Any, *, prompts: TokenIds, responses: TokenIds, batching: Batching
) -> Float[Tensor, " row"]:
    """Returns -log P(response | prompt) in nats, EOS included where the response ended."""

    def surprise(batch: Batch) -> tuple[Tensor]:
        tokens = response_tokens(batch).to(model.device)
        return (-token_logprobs(model, _states(model, batch), tokens).cpu(),)

    return _summed(surprise, prompts, responses, batching=batching, packed=is_packed(model))[0]


def _states(model: Any, batch: Batch) -> Float[Tensor, "token width"]:
    return response_states(model, batch.to(model.device))


def _summed(
    figures: Callable[[Batch], Sequence[Float[Tensor, " token"]]],
    prompts: TokenIds,
    responses: TokenIds,
    *,
    batching: Batching,
    packed: bool,
) -> list[Float[Tensor, " row"]]:
    """Returns figures of response tokens, summed over each row; rows of like length are a batch."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    chosen = by_length(lengths, batch_size=batching.batch_size)

    @torch.inference_mode()
    def sums(rows: list[int]) -> list[Tensor]:
        batch = collate(
            [prompts[row] for row in rows],
            [responses[row] for row in rows],
            pad_id=batching.pad_id,
            packed=packed,
        )
        counts = torch.tensor([len(responses[row]) for row in rows])
        owner = torch.arange(len(rows)).repeat_interleave(counts)
        zeros = torch.zeros(len(rows))
        return [zeros.index_add(0, owner, tokens) for tokens in figures(batch)]

    order = torch.tensor([row for rows in chosen for row in rows]).argsort()
    found = side_by_side(sums, chosen, workers=batching.workers)
    return [torch.cat(parts)[order] for parts in zip(*found, strict=True)]
