"""Log-probabilities and entropies of tokens without distributions that outlive a few rows.

Autograd would keep log-softmax of all rows, fill as many zeros for the token that was picked, and
pass over both again. Here the way back knows the formula, and takes rows by the megabyte, so that
what stands between the products stays in the processor's cache.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import UserError

BLOCK = 1 << 18
"""Logits that are worked on at a time: a megabyte in float32."""

LARGEST_LOSS = 700.0
"""Nats per token; exp of 710 is no number, and guessing among a million words loses 14."""


def perplexity(loss: float) -> float:
    """Returns exp(loss) of a mean loss in nats per token.

    Raises:
        UserError: it is beyond every number, or there is none.
    """
    if not loss <= LARGEST_LOSS:
        raise UserError(
            f"a loss of {loss:.3g} nats per token: the model has diverged. Lower the learning rate "
            "of the stage that trains it"
        )
    return math.exp(loss)


def wide(values: Tensor) -> Tensor:
    """Returns floats in float32, or as they are where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def picked(
    logits: Float[Tensor, "token vocabulary"],
    tokens: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"] | None]:
    """Returns log p of each token under softmax(logits / temperature), and -sum p log p in nats.

    Both are float32 or wider whatever the logits are.

    Args:
        logits: one row a token.
        tokens: what was picked.
        temperature: divides the logits.
        entropy: whether it is wanted; else None stands for it.
    """
    chosen, entropies = _Picked.apply(logits, tokens, temperature, entropy)
    return chosen, entropies if entropy else None


class _Picked(torch.autograd.Function):
    """With z = logits / T and H the entropy: d log p_y / dz = e_y - p, dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        chosen = wide(logits.new_empty(len(logits)))
        norms, entropies = torch.empty_like(chosen), torch.zeros_like(chosen)
        for rows in blocks(logits):
            scaled, mine = _scaled(logits[rows], temperature), tokens[rows, None]
            logprobs = scaled.log_softmax(dim=-1)
            chosen[rows] = logprobs.gather(1, mine)[:, 0]
            norms[rows] = scaled.gather(1, mine)[:, 0] - chosen[rows]
            if entropy:
                entropies[rows] = -(logprobs.exp() * logprobs).sum(dim=-1)
        ctx.save_for_backward(logits, tokens, norms, entropies)
        ctx.temperature, ctx.entropy = temperature, entropy
        return chosen, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_chosen: Tensor, of_entropy: Tensor) -> tuple[Any, ...]:
        logits, tokens, norms, entropies = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        of_chosen, of_entropy = of_chosen / ctx.temperature, of_entropy / ctx.temperature
        for rows in blocks(logits):
            logprobs = _scaled(logits[rows], ctx.temperature) - norms[rows, None]
            if ctx.entropy:
                weights = of_entropy[rows, None] * (logprobs + entropies[rows, None])
                gradient = logprobs.exp_().mul_(weights.add_(of_chosen[rows, None]).neg_())
            else:
                gradient = logprobs.exp_().mul_(-of_chosen[rows, None])
            gradient.scatter_add_(1, tokens[rows, None], of_chosen[rows, None])
            of_logits[rows] = gradient
        return of_logits, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return wide(logits) if temperature == 1 else wide(logits) / temperature


def blocks(logits: Tensor) -> Iterator[slice]:
    """Returns the rows that are worked on at a time: few on a processor, elsewhere all."""
    size = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return (slice(start, start + size) for start in range(0, len(logits), size))
