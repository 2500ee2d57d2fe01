"""The KL penalty: estimators, the exact divergence, and the controllers of its coefficient."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.ppo.advantages import token_mean

ERROR_CLIP = 0.2
"""Largest relative error the adaptive controller answers to (Ziegler et al. 2019, section 2.2)."""


def k1(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Returns log pi - log pi_ref: unbiased for KL(pi || ref) on samples of pi, may be negative."""
    return logprobs - ref_logprobs


def k2(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Returns (log pi - log pi_ref)^2 / 2: biased for the KL, its gradient is not.

    Schulman 2020, "Approximating KL divergence".
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Returns r - 1 - log r with r = pi_ref / pi: unbiased as k1 and never negative.

    Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1.0 - log_ratio


def full_kl(
    logits: Float[Tensor, "token vocabulary"], ref_logits: Float[Tensor, "token vocabulary"]
) -> Float[Tensor, "token"]:
    """Returns KL(pi || ref) over the whole vocabulary at every token; log-probabilities will do."""
    logprobs, ref_logprobs = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)


def compensated(
    kl: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, share: float
) -> Float[Tensor, "batch time"]:
    """Returns each token's KL less a share of the mean over all valid tokens, 0 outside the mask.

    A policy that has moved pays for every token it writes, so the penalty itself makes it stop
    early. At share 1 the tokens of a rollout pay nothing on average: those that stray more than
    the mean pay, the others are paid, and length alone changes nothing. Ours.

    Args:
        kl: KL of each token; anything outside the mask.
        mask: True on response tokens.
        share: 0 leaves the penalty as it is, 1 makes it indifferent to length.
    """
    return torch.where(mask, kl - share * token_mean(kl, mask), 0.0)


@dataclass
class FixedController:
    """A KL coefficient that never changes."""

    coef: float

    def update(self, kl: float, *, num_episodes: int) -> None:
        """Does nothing: the coefficient is fixed."""

    def state(self) -> dict[str, float]:
        """Returns what a resume point must keep."""
        return {"coef": self.coef}


@dataclass
class AdaptiveController:
    """A KL coefficient that steers the KL per response to a target.

    e = clip(KL / target - 1, -0.2, 0.2);  beta *= 1 + e n / horizon  (Ziegler et al. 2019,
    section 2.2).

    Attributes:
        coef: beta, the coefficient now.
        target: KL per response in nats.
        horizon: episodes over which the coefficient can change by a factor of about e^0.2.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, *, num_episodes: int) -> None:
        """Moves the coefficient after an update.

        Args:
            kl: KL summed over tokens, averaged over the rows of all ranks, in nats.
            num_episodes: rows of that update over all ranks.
        """
        error = min(max(kl / self.target - 1.0, -ERROR_CLIP), ERROR_CLIP)
        self.coef *= 1.0 + error * num_episodes / self.horizon

    def state(self) -> dict[str, float]:
        """Returns what a resume point must keep."""
        return {"coef": self.coef}


Controller = FixedController | AdaptiveController
