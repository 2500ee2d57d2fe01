"""From one score per response to one reward per token. Pure torch."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def final_scores(
    scores: Float[Tensor, "batch"],
    ended: Bool[Tensor, "batch"],
    *,
    missing_eos_score: float | None,
    clip: float,
) -> Float[Tensor, "batch"]:
    """Returns normalised scores, clipped, and replaced where a response never ended.

    Args:
        scores: normalised scores of the reward model.
        ended: True where the response holds its EOS.
        missing_eos_score: score of a response without EOS; None keeps the reward model's.
        clip: scores are clipped to [-clip, clip]; 0 does not clip.
    """
    clipped = scores.clamp(-clip, clip) if clip > 0 else scores
    if missing_eos_score is None:
        return clipped
    return torch.where(ended, clipped, missing_eos_score)


def token_rewards(
    scores: Float[Tensor, "batch"],
    kl: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kl_coef: float,
) -> Float[Tensor, "batch time"]:
    """Returns r_t = -beta KL_t, plus the score on the last valid token; 0 outside the mask.

    Ziegler et al. 2019, eq. 2, spread over tokens.

    Args:
        scores: one per response.
        kl: log pi - log pi_ref of each token (k1); anything outside the mask.
        mask: True on response tokens, which start at column 0 without gaps; one or more a row.
        kl_coef: beta.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = torch.zeros_like(rewards).scatter(1, mask.sum(dim=1, keepdim=True) - 1, 1.0)
    return rewards + last * scores[:, None]
