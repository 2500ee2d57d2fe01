"""The metrics of an update, over the rows of all processes."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from pipeline.ppo.advantages import sequence_sum, token_mean
from pipeline.ppo.experience import Experience
from pipeline.ppo.kl import k3
from pipeline.ppo.losses import Loss

MOMENTS = {"policy/ratio": "policy/ratio_mean", "policy/ratio_squared": "policy/ratio_var"}
"""Sums whose metric has another name: mean and, less the mean's square, variance."""


def objective(
    experience: Experience,
    scores: Float[Tensor, " batch"],
    penalised: Float[Tensor, "batch time"],
    *,
    kl_coef: float,
    clip: float,
) -> dict[str, float]:
    """Returns what an update maximises and the shape of its responses.

    Args:
        experience: the rollout; its scores are those of the reward model or of all sources.
        scores: those that entered the rewards, clipped and with the missing-EOS score.
        penalised: KL of each token that is paid for, compensated for length; 0 outside the mask.
        kl_coef: beta of this update.
        clip: where scores were clipped; 0 when they were not.
    """
    mask = experience.mask
    kl = float(sequence_sum(experience.kl, mask).mean())
    k3_terms = k3(experience.logprobs, experience.ref_logprobs)
    means = {f"score/{name}": float(part.mean()) for name, part in experience.parts.items()}
    clipped = float((experience.scores.abs() > clip).float().mean()) if clip > 0 else 0.0
    return {
        "objective/kl": kl,
        "objective/kl_k3": float(sequence_sum(k3_terms, mask).mean()),
        "objective/score": float(experience.scores.mean()),
        "objective/reward": float(scores.mean())
        - kl_coef * float(sequence_sum(penalised, mask).mean()),
        "objective/entropy": float(token_mean(experience.entropy, mask)),
        "reward/clip_frac": clipped,
        "response/length_tokens": float(mask.sum(dim=1).float().mean()),
        "response/eos_frac": float(experience.ended.float().mean()),
        "kl/coef": kl_coef,
        **(means if len(means) > 1 else {}),
    }


def named_sums(losses: Mapping[str, Loss]) -> dict[str, float]:
    """Returns a micro-batch's share of every loss, and its sums, under the names of metrics."""
    named: dict[str, float] = {}
    for group, loss in losses.items():
        named[f"{group}/loss"] = float(loss.value.detach())
        named |= {f"{group}/{name}": value for name, value in loss.sums.items()}
    return named


def step_metrics(parts: Sequence[Mapping[str, float]], *, num_tokens: int) -> dict[str, float]:
    """Returns a minibatch's metrics from the sums of its micro-batches on all processes.

    Losses were divided by the minibatch's tokens before; what else was summed is divided here.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    metrics: dict[str, float] = {}
    for name in names:
        total = sum(part.get(name, 0.0) for part in parts)
        metrics[MOMENTS.get(name, name)] = total if name.endswith("/loss") else total / num_tokens
    metrics["policy/ratio_var"] -= metrics["policy/ratio_mean"] ** 2
    return metrics


def explained_variance(values: Float[Tensor, " token"], returns: Float[Tensor, " token"]) -> float:
    """Returns 1 - Var(returns - values) / Var(returns)."""
    return float(1.0 - (returns - values).var() / returns.var())
