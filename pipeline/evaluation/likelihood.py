"""Divergence and likelihood of responses, summed over each response's tokens in float32."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.ppo.kl import full_kl
from pipeline.sequences import collate, next_logits, response_states

TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of a policy from its reference on the policy's own responses, in nats."""

    kl: Float[Tensor, " row"]
    """Sum over tokens of the full-vocabulary KL(policy || reference)."""
    k1: Float[Tensor, " row"]
    """Sum over tokens of log policy - log reference at the token that was sampled."""


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Response tokens of one batch with the log-probabilities they were predicted from."""

    row: Int[Tensor, " token"]
    token: Int[Tensor, " token"]
    logprobs: Float[Tensor, "token vocabulary"]

    def sampled(self) -> Float[Tensor, " token"]:
        """Log-probability of each response token."""
        return self.logprobs.gather(1, self.token[:, None])[:, 0]


def divergence(
    policy: nn.Module,
    *,
    reference: nn.Module,
    prompts: TokenIds,
    responses: TokenIds,
    pad_id: int,
    batch_size: int,
) -> Divergence:
    """Returns the divergence of the policy from the reference, response by response.

    Args:
        policy: the model that wrote the responses, at temperature 1.
        reference: the model it is held against; same vocabulary.
        prompts: token ids, one list a row.
        responses: token ids, one list a row, EOS included where the response ended.
        pad_id: token id that fills the rows up.
        batch_size: rows of one forward pass.
    """
    kl, k1 = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    pairs = zip(
        _forward(policy, prompts, responses, pad_id=pad_id, batch_size=batch_size),
        _forward(reference, prompts, responses, pad_id=pad_id, batch_size=batch_size),
        strict=True,
    )
    for ours, theirs in pairs:
        kl = kl.index_add(0, ours.row, full_kl(ours.logprobs, theirs.logprobs))
        k1 = k1.index_add(0, ours.row, ours.sampled() - theirs.sampled())
    return Divergence(kl=kl, k1=k1)


def negative_log_likelihood(
    model: nn.Module, *, prompts: TokenIds, responses: TokenIds, pad_id: int, batch_size: int
) -> Float[Tensor, " row"]:
    """Returns -log P(response | prompt) in nats, EOS included where the response ended."""
    total = torch.zeros(len(prompts))
    for tokens in _forward(model, prompts, responses, pad_id=pad_id, batch_size=batch_size):
        total = total.index_add(0, tokens.row, -tokens.sampled())
    return total


def _forward(
    model: nn.Module, prompts: TokenIds, responses: TokenIds, *, pad_id: int, batch_size: int
) -> Iterator[_Tokens]:
    """Yields the response tokens of each batch, row by row."""
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        batch = collate(prompts[rows], responses[rows], pad_id=pad_id)
        with torch.inference_mode():
            logits = next_logits(model, response_states(model, batch.to(device))).cpu()
        yield _Tokens(
            row=batch.response_mask.nonzero()[:, 0] + start,
            token=batch.input_ids[batch.response_mask],
            logprobs=logits.log_softmax(-1),
        )
