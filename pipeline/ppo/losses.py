"""The losses of PPO: clipped for policy and value, KL and entropy beside them. Pure torch.

All are sums over a micro-batch divided by the number of valid tokens of the whole
minibatch, over all ranks and micro-batches, so that the way the work is cut changes nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.ppo.kl import k2, k3


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
    clip_high: float | None = None,
    dual_clip: float | None = None,
    num_tokens: int,
) -> Loss:
    """Returns -min(rho A, clip(rho, 1 - c, 1 + h) A), summed over tokens and divided by num_tokens.

    rho = pi(a|s) / pi_old(a|s); Schulman et al. 2017, eq. 7, where h = c. With a dual clip d, the
    loss of a token of negative advantage is at most -d A (Ye et al. 2020, eq. 5).

    Args:
        logprobs: log pi of each response token, with gradient; anything outside the mask.
        old_logprobs: the same at the time of sampling.
        advantages: whitened advantages.
        mask: True on response tokens.
        clip: c, how far the ratio is trusted below 1.
        clip_high: h, how far above 1 (Yu et al. 2025, eq. 10); None for the same.
        dual_clip: d, above 1; None for no bound.
        num_tokens: valid tokens of the whole minibatch, over all ranks.
    """
    log_ratio = (logprobs - old_logprobs)[mask]
    ratio, advantage = log_ratio.exp(), advantages[mask]
    unclipped = -advantage * ratio
    upper = clip if clip_high is None else clip_high
    clipped = -advantage * ratio.clamp(1.0 - clip, 1.0 + upper)
    tokens = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        tokens = torch.where(advantage < 0, tokens.clamp(max=-dual_clip * advantage), tokens)
    with torch.no_grad():
        sums = {
            "approx_kl": float((ratio - 1.0 - log_ratio).sum()),
            "clip_frac": float((tokens != unclipped).sum()),
            "ratio": float(ratio.sum()),
            "ratio_squared": float(ratio.square().sum()),
        }
    return Loss(tokens.sum() / num_tokens, sums)


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


def kl_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    estimator: str,
    num_tokens: int,
    weights: Float[Tensor, "batch time"] | None = None,
) -> Loss:
    """Returns rho k2 or rho k3, summed over tokens and divided by num_tokens.

    rho = pi / pi_old is a weight without gradient: samples of pi_old stand for samples of pi. In
    expectation k2 descends KL(pi || pi_ref), since E_pi[log(pi / pi_ref) grad log pi] is its
    gradient; k3 descends KL(pi_ref || pi), since E_pi[(1 - pi_ref / pi) grad log pi] is the
    gradient of that. Schulman 2020; Tang and Munos 2025.

    Args:
        logprobs: log pi of each response token, with gradient; anything outside the mask.
        old_logprobs: the same at the time of sampling.
        ref_logprobs: log pi_ref.
        mask: True on response tokens.
        estimator: k2 or k3.
        num_tokens: valid tokens of the whole minibatch, over all ranks.
        weights: of samples that are not the policy's own; None for 1.
    """
    new, old, reference = logprobs[mask], old_logprobs[mask], ref_logprobs[mask]
    weight = (new - old).detach().exp()
    if weights is not None:
        weight = weight * weights[mask]
    terms = k2(new, reference) if estimator == "k2" else k3(new, reference)
    return Loss((weight * terms).sum() / num_tokens, {})


def entropy_loss(
    entropy: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, num_tokens: int
) -> Loss:
    """Returns minus the entropy, summed over tokens and divided by num_tokens.

    Williams and Peng 1991; Schulman et al. 2017, eq. 9.
    """
    return Loss(-entropy[mask].sum() / num_tokens, {})


def text_loss(logprobs: Float[Tensor, "row time"], *, num_tokens: int) -> Loss:
    """Returns the negative log-likelihood of rows of text in nats, divided by num_tokens.

    Args:
        logprobs: of each token but the first of a row, which is predicted by nothing.
        num_tokens: predicted tokens of the whole minibatch, over all ranks.
    """
    return Loss(-logprobs.sum() / num_tokens, {})
