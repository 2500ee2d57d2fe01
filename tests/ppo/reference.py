"""PPO for language models as the papers write it: slow, obvious, and nothing of the library.

Python floats only; one loop over responses, one over tokens. A batch is a list of responses, each
a list with one number per token, so there is no padding and no mask to get wrong.

[Z] Ziegler et al. 2019; [H] Huang et al. 2024; [P] Schulman et al. 2017; [G] Schulman et al. 2016.
"""

import math
from dataclasses import dataclass

Rows = list[list[float]]


def each(function, *batches):
    """function(token of the first batch, token of the second, …) for every token."""
    return [
        [function(*tokens) for tokens in zip(*rows, strict=True)]
        for rows in zip(*batches, strict=True)
    ]


def flat(rows):
    return [token for row in rows for token in row]


def k1(logprob, ref_logprob):
    """log(p / q)."""
    return logprob - ref_logprob


def k3(logprob, ref_logprob):
    """The estimate q / p - 1 - log(q / p); Schulman 2020."""
    return math.exp(ref_logprob) / math.exp(logprob) - 1.0 + (logprob - ref_logprob)


def full_kl(probabilities, ref_probabilities):
    """The sum of p log(p / q) over the vocabulary."""
    return sum(
        p * math.log(p / q) for p, q in zip(probabilities, ref_probabilities, strict=True) if p > 0
    )


def final_score(score, *, ended, missing_eos_score, clip):
    """[H] clip first, then replace the score of a response that never ended."""
    if not ended and missing_eos_score is not None:
        return missing_eos_score
    return min(max(score, -clip), clip) if clip > 0 else score


def compensated(kl, *, share):
    """Ours: each token's KL less a share of the mean over all tokens."""
    tokens = flat(kl)
    return each(lambda token: token - share * sum(tokens) / len(tokens), kl)


def token_rewards(scores, kl, *, coef):
    """[Z] eq. 2: -beta KL_t at every token, and the score once more at the last."""
    rewards = each(lambda token: -coef * token, kl)
    for row, score in zip(rewards, scores, strict=True):
        row[-1] += score
    return rewards


def whiten(rows, *, shift_mean):
    """[Z] code: (x - mean) / sqrt(variance + 1e-8) over all tokens; the mean may be put back."""
    tokens = flat(rows)
    mean = sum(tokens) / len(tokens)
    variance = sum((token - mean) ** 2 for token in tokens) / len(tokens)
    back = 0.0 if shift_mean else mean
    return each(lambda token: (token - mean) / math.sqrt(variance + 1e-8) + back, rows)


def advantages(rewards, values, *, gamma, lam):
    """[G] eq. 16 as it stands: A_t = sum over l of (gamma lam)^l delta_{t+l}; V after the end 0."""
    result = []
    for reward, value in zip(rewards, values, strict=True):
        after = [*value[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(reward, after, value, strict=True)]
        result.append(
            [
                sum((gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[t:]))
                for t in range(len(deltas))
            ]
        )
    return result


@dataclass
class Loss:
    """A minibatch's loss, its gradient by each token's input, and sums over tokens."""

    value: float
    gradient: Rows
    sums: dict[str, float]


def policy_loss(logprobs, old_logprobs, advantages, *, clip, num_tokens):
    """[P] eq. 7: -min(rho A, clip(rho) A); d rho / d log pi = rho, and none where clipped."""
    total, gradient = 0.0, []
    sums = dict.fromkeys(("approx_kl", "clip_frac", "ratio", "ratio_squared"), 0.0)
    for row in zip(logprobs, old_logprobs, advantages, strict=True):
        gradient.append([])
        for new, old, advantage in zip(*row, strict=True):
            ratio = math.exp(new - old)
            inside = ratio * advantage
            bounded = min(max(ratio, 1.0 - clip), 1.0 + clip) * advantage
            total -= min(inside, bounded) / num_tokens
            gradient[-1].append(-inside / num_tokens if inside <= bounded else 0.0)
            sums["approx_kl"] += ratio - 1.0 - math.log(ratio)
            sums["clip_frac"] += bounded < inside
            sums["ratio"] += ratio
            sums["ratio_squared"] += ratio**2
    return Loss(total, gradient, sums)


def value_loss(values, old_values, returns, *, clip, num_tokens):
    """[Z] code: half the larger of (V - R)^2 and (V_near - R)^2, V_near within clip of V_old."""
    total, gradient, clipped = 0.0, [], 0.0
    for row in zip(values, old_values, returns, strict=True):
        gradient.append([])
        for value, old, target in zip(*row, strict=True):
            near = min(max(value, old - clip), old + clip)
            far_error, near_error = (value - target) ** 2, (near - target) ** 2
            total += 0.5 * max(far_error, near_error) / num_tokens
            moves = far_error >= near_error
            gradient[-1].append((value - target) / num_tokens if moves else 0.0)
            clipped += near_error > far_error
    return Loss(total, gradient, {"clip_frac": clipped})


def adapted(coef, kl, *, target, horizon, num_episodes):
    """[Z] section 2.2: e = clip(KL / target - 1, -0.2, 0.2); beta (1 + e n / horizon)."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coef * (1.0 + error * num_episodes / horizon)


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R)."""

    def variance(tokens):
        mean = sum(tokens) / len(tokens)
        return sum((token - mean) ** 2 for token in tokens)

    errors = [r - v for r, v in zip(flat(returns), flat(values), strict=True)]
    return 1.0 - variance(errors) / variance(flat(returns))
