"""Advantages: of tokens by a critic, or of whole responses by comparison. Pure torch."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WHITEN_EPSILON = 1e-8
"""Keeps whitening finite when all values are equal; far below any variance that matters."""


def token_mean(
    values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Returns the mean over all valid tokens of the batch, each token counting the same.

    Args:
        values: per-token values; anything outside the mask.
        mask: True where a token counts; at least one must.
    """
    return values[mask].mean()


def sequence_sum(
    values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch"]:
    """Returns each sequence's sum over its valid tokens."""
    return torch.where(mask, values, 0.0).sum(dim=1)


def whiten(
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    shift_mean: bool = True,
) -> Float[Tensor, "batch time"]:
    """Returns the values scaled to variance 1 over the valid tokens, 0 outside the mask.

    (x - mean) / sqrt(var + eps), population variance (Huang et al. 2024, detail "whitening").

    Args:
        values: per-token values; anything outside the mask.
        mask: True where a token counts.
        shift_mean: True removes the mean as well; False keeps it, as rewards need.
    """
    valid = values[mask]
    mean, variance = valid.mean(), valid.var(unbiased=False)
    whitened = (values - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Returns advantages and returns by generalised advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1}  (Schulman et al. 2016,
    eq. 11 and 16); returns_t = A_t + V_t. A response ends at its last valid token: the value after
    it is 0, nothing is bootstrapped.

    Args:
        rewards: per-token rewards; anything outside the mask.
        values: value of the state before each token; anything outside the mask.
        mask: True on response tokens, which start at column 0 without gaps.
        gamma: discount per token.
        lam: trace decay.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    carried = torch.zeros_like(deltas[:, 0])
    columns = []
    for column in reversed(range(deltas.shape[1])):
        carried = deltas[:, column] + gamma * lam * carried
        columns.append(carried)
    advantages = torch.stack(columns[::-1], dim=1)
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def rloo(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, group: int
) -> Float[Tensor, "batch time"]:
    """Returns each response's reward less the mean of the other responses to its prompt.

    A_i = R_i - 1 / (k - 1) sum_{j != i} R_j, on every token of response i (Ahmadian et al. 2024,
    section 3.2: the whole response is one action).

    Args:
        rewards: per-token rewards; anything outside the mask.
        mask: True on response tokens.
        group: k, responses to one prompt; they stand in adjacent rows.
    """
    totals = sequence_sum(rewards, mask).view(-1, group)
    others = (totals.sum(dim=1, keepdim=True) - totals) / (group - 1)
    return torch.where(mask, (totals - others).view(-1, 1), 0.0)


def grpo(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, group: int
) -> Float[Tensor, "batch time"]:
    """Returns each response's reward, shifted and scaled by those of all responses to its prompt.

    A_i = (R_i - mean(R)) / sqrt(var(R) + eps), population variance, on every token of response i
    (Shao et al. 2024, section 4.1.2). A group of equal rewards has advantage 0.

    Args:
        rewards: per-token rewards; anything outside the mask.
        mask: True on response tokens.
        group: responses to one prompt; they stand in adjacent rows.
    """
    totals = sequence_sum(rewards, mask).view(-1, group)
    centred = totals - totals.mean(dim=1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + WHITEN_EPSILON)
    return torch.where(mask, (centred * scale).view(-1, 1), 0.0)


def reinforce(
    rewards: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    baseline: float,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Returns advantages and the rewards to go, G_t = r_t + gamma G_{t+1}.

    A_t = (G_t - b) / std(G - b) over all valid tokens (Williams 1992). Whitening would shift the
    mean to 0 and cancel b; so only the scale is set.

    Args:
        rewards: per-token rewards; anything outside the mask.
        mask: True on response tokens, which start at column 0 without gaps.
        gamma: discount per token.
        baseline: b; from earlier updates, so that it does not depend on these responses.
    """
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    scale = torch.rsqrt(to_go[mask].var(unbiased=False) + WHITEN_EPSILON)
    return torch.where(mask, (to_go - baseline) * scale, 0.0), to_go


@dataclass
class RunningBaseline:
    """A running mean of the returns of responses: b <- decay b + (1 - decay) mean.

    Attributes:
        decay: share of the past that an update keeps.
        value: b; 0 at first, the mean score of SFT responses by the reward model's constants.
    """

    decay: float
    value: float = 0.0

    def update(self, mean: float) -> None:
        """Takes in the mean return of an update's responses."""
        self.value = self.decay * self.value + (1.0 - self.decay) * mean
