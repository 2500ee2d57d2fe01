"""The clipped losses of PPO. Pure torch.

Both losses are sums over a micro-batch divided by the number of valid tokens of the whole
minibatch, over all ranks and micro-batches, so that the way the work is cut changes nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of a loss, and the sums its metrics are made of.

    Attributes:
        value: scalar to differentiate, already divided by the minibatch's valid tokens.
        sums: detached sums over valid tokens, by metric.
    """

    value: Float[Tensor, ""]
    sums: dict[str, float]


def policy_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip: float,
    num_tokens: int,
) -> Loss:
    """Returns -min(rho A, clip(rho, 1 - c, 1 + c) A), summed over tokens and divided by num_tokens.

    rho = pi(a|s) / pi_old(a|s); Schulman et al. 2017, eq. 7.

    Args:
        logprobs: log pi of each response token, with gradient; anything outside the mask.
        old_logprobs: the same at the time of sampling.
        advantages: whitened advantages.
        mask: True on response tokens.
        clip: c, half width of the trusted interval.
        num_tokens: valid tokens of the whole minibatch, over all ranks.
    """
    log_ratio = (logprobs - old_logprobs)[mask]
    ratio, advantage = log_ratio.exp(), advantages[mask]
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = torch.maximum(unclipped, clipped).sum() / num_tokens
    with torch.no_grad():
        sums = {
            "approx_kl": float((ratio - 1.0 - log_ratio).sum()),
            "clip_frac": float((clipped > unclipped).sum()),
            "ratio": float(ratio.sum()),
            "ratio_squared": float(ratio.square().sum()),
        }
    return Loss(loss, sums)


def value_loss(
    values: Float[Tensor, "batch time"],
    old_values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip: float,
    num_tokens: int,
) -> Loss:
    """Returns 0.5 max((V - R)^2, (V_clipped - R)^2), summed over tokens, divided by num_tokens.

    V_clipped = V_old + clip(V - V_old, -c, c); Ziegler et al. 2019 (code), Huang et al. 2024.

    Args:
        values: value of the state before each token, with gradient; anything outside the mask.
        old_values: the same at the time of sampling.
        returns: targets R.
        mask: True on response tokens.
        clip: c, how far a value may move in one update before its gradient stops.
        num_tokens: valid tokens of the whole minibatch, over all ranks.
    """
    value, old, target = values[mask], old_values[mask], returns[mask]
    near = value.clamp(old - clip, old + clip)  # exactly the value where it is not clipped
    unclipped, clipped = (value - target).square(), (near - target).square()
    loss = 0.5 * torch.maximum(unclipped, clipped).sum() / num_tokens
    return Loss(loss, {"clip_frac": float((clipped > unclipped).sum())})
