"""Truncated importance sampling: what an engine sampled stands for what the policy would have.

An engine computes the same weights with other kernels, in another precision or cut otherwise, so it
samples from a q that is not quite the policy pi. Left alone, that makes every update off-policy
(Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def truncated_weights(
    logprobs: Float[Tensor, "batch time"],
    engine_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    cap: float,
    level: str,
) -> Float[Tensor, "batch time"]:
    """Returns min(pi / q, C) for every token, 0 outside the mask.

    By sequence, the ratio is that of the whole response, the same for its tokens: below the cap
    E_q[w sum_t A_t grad log pi_t] is then exactly E_pi[sum_t A_t grad log pi_t]. By token it is
    each token's own: less noisy, and exact but for the states, which stay those that q visits.

    Args:
        logprobs: log pi of each token before the update.
        engine_logprobs: log q, what the engine drew it with.
        mask: True on response tokens.
        cap: C, which bounds the variance; Yao et al. 2025, section on TIS.
        level: token or sequence.
    """
    ratio = _log_ratio(logprobs, engine_logprobs, mask)
    if level == "sequence":
        ratio = ratio.sum(dim=1, keepdim=True).expand_as(ratio)
    return torch.where(mask, ratio.exp().clamp(max=cap), 0.0)


def mismatch(
    logprobs: Float[Tensor, "batch time"],
    engine_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    weights: Float[Tensor, "batch time"],
    *,
    cap: float,
) -> dict[str, float]:
    """Returns how far the engine is from the policy, over all tokens, in nats, and what it costs.

    KL(q || pi) is estimated by k1 on q's own samples. The effective share is
    (sum w)^2 / (n sum w^2): 1 where all tokens weigh alike (Kong 1992).
    """
    gap = -_log_ratio(logprobs, engine_logprobs, mask)[mask]
    weight = weights[mask]
    return {
        "engine/kl": float(gap.mean()),
        "engine/gap_mean": float(gap.abs().mean()),
        "engine/gap_max": float(gap.abs().max()),
        "engine/weight_mean": float(weight.mean()),
        "engine/capped_frac": float((weight >= cap).float().mean()),
        "engine/effective_frac": float(weight.sum() ** 2 / (len(weight) * weight.square().sum())),
    }


def _log_ratio(
    logprobs: Float[Tensor, "batch time"],
    engine_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    return torch.where(mask, logprobs - engine_logprobs, 0.0)
