"""The metrics of an update, over the rows of all processes."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from pipeline.ppo.advantages import sequence_sum, token_mean
from pipeline.ppo.experience import Experience
from pipeline.ppo.kl import k3
from pipeline.ppo.losses import Loss


def objective(
    experience: Experience, scores: Float[Tensor, " batch"], *, kl_coef: float, clip: float
) -> dict[str, float]:
    """Returns what an update maximises and the shape of its responses.

    Args:
        experience: the rollout; its scores are the reward model's own.
        scores: those that entered the rewards, clipped and with the missing-EOS score.
        kl_coef: beta of this update.
        clip: where scores were clipped; 0 when they were not.
    """
    mask = experience.mask
    kl = float(sequence_sum(experience.kl, mask).mean())
    k3_terms = k3(experience.logprobs, experience.ref_logprobs)
    clipped = float((experience.scores.abs() > clip).float().mean()) if clip > 0 else 0.0
    return {
        "objective/kl": kl,
        "objective/kl_k3": float(sequence_sum(k3_terms, mask).mean()),
        "objective/score": float(experience.scores.mean()),
        "objective/reward": float(scores.mean()) - kl_coef * kl,
        "objective/entropy": float(token_mean(experience.entropy, mask)),
        "reward/clip_frac": clipped,
        "response/length_tokens": float(mask.sum(dim=1).float().mean()),
        "response/eos_frac": float(experience.ended.float().mean()),
        "kl/coef": kl_coef,
    }


def named_sums(group: str, loss: Loss) -> dict[str, float]:
    """Returns a micro-batch's sums under the names of their metrics."""
    named = {f"{group}/{name}": value for name, value in loss.sums.items()}
    return {**named, f"{group}/loss": float(loss.value.detach())}


def step_metrics(parts: Sequence[dict[str, float]], *, num_tokens: int) -> dict[str, float]:
    """Returns a minibatch's metrics from the sums of its micro-batches on all processes."""
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    ratio = sums["policy/ratio"] / num_tokens
    return {
        "policy/loss": sums["policy/loss"],
        "policy/approx_kl": sums["policy/approx_kl"] / num_tokens,
        "policy/clip_frac": sums["policy/clip_frac"] / num_tokens,
        "policy/ratio_mean": ratio,
        "policy/ratio_var": sums["policy/ratio_squared"] / num_tokens - ratio**2,
        "value/loss": sums["value/loss"],
        "value/clip_frac": sums["value/clip_frac"] / num_tokens,
    }


def explained_variance(values: Float[Tensor, " token"], returns: Float[Tensor, " token"]) -> float:
    """Returns 1 - Var(returns - values) / Var(returns)."""
    return float(1.0 - (returns - values).var() / returns.var())
