"""SFT against PPO: every figure of DESIGN.md from the records of an evaluation."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.evaluation import diversity, statistics
from pipeline.evaluation.best_of_n import Point, at_equal_kl, best_weights, kl_bound
from pipeline.evaluation.records import Judged, Record
from pipeline.evaluation.statistics import Array, Weights


def compare(
    records: Sequence[Record], *, sizes: Sequence[int], bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """Returns `policies`, `comparison`, `best_of_n` and `equal_kl` as plain JSON values.

    Args:
        records: one per prompt.
        sizes: the n of best-of-n, ascending.
        bootstrap_samples: samples behind every interval.
        seed: seed of the bootstrap.
    """
    weights = statistics.resample(
        [record.group for record in records], samples=bootstrap_samples, seed=seed
    )
    replies = {
        "sft": [record.sft for record in records],
        "ppo": [record.ppo for record in records],
    }
    counts = {name: diversity.bigrams([r.text for r in rows]) for name, rows in replies.items()}
    size = min(count.total() for count in counts.values())
    policies = {
        name: _policy(rows, bigrams=counts[name], size=size, weights=weights)
        for name, rows in replies.items()
    }
    head_to_head = _head_to_head(records, policies=policies, weights=weights)
    results = {"policies": policies, "comparison": head_to_head, "distinct_2_bigrams": size}
    return results | _control(records, sizes=sizes, samples=bootstrap_samples, seed=seed)


def _policy(
    replies: Sequence[Judged],
    *,
    bigrams: Counter[tuple[str, str]],
    size: int,
    weights: Weights,
) -> dict[str, Any]:
    """Returns the figures of one policy."""
    tokens = _column(replies, "num_tokens")
    text, share = diversity.commonest([reply.text for reply in replies])
    return {
        "gold": _plain(statistics.mean(_column(replies, "gold"), weights)),
        "reward": _plain(statistics.mean(_column(replies, "reward"), weights)),
        "length_tokens": _plain(statistics.mean(tokens, weights)),
        "length_words": float(np.mean([len(diversity.words(r.text)) for r in replies])),
        "eos_frac": _plain(statistics.mean(_column(replies, "ended"), weights)),
        "perplexity": _plain(
            statistics.ratio(_column(replies, "nll"), tokens, weights, transform=np.exp)
        ),
        "distinct_2": diversity.distinct_2(bigrams, size=size),
        "commonest_reply": text,
        "commonest_reply_frac": share,
        "distinct_reply_frac": diversity.distinct_frac([reply.text for reply in replies]),
    }


def _head_to_head(
    records: Sequence[Record], *, policies: dict[str, Any], weights: Weights
) -> dict[str, Any]:
    """Returns the figures that need both policies."""
    sft, ppo = [record.sft for record in records], [record.ppo for record in records]
    wins = statistics.outcomes(_column(ppo, "gold"), _column(sft, "gold"))
    reward_wins = statistics.outcomes(_column(ppo, "reward"), _column(sft, "reward"))
    longer = _column(ppo, "num_tokens") - _column(sft, "num_tokens")
    estimates = {
        "gold_win_rate": statistics.mean(wins, weights),
        "reward_win_rate": statistics.mean(reward_wins, weights),
        "length_controlled_win_rate": statistics.length_controlled(wins, longer, weights),
        "kl": statistics.mean(np.array([record.kl for record in records]), weights),
        "kl_k1": statistics.mean(np.array([record.k1 for record in records]), weights),
        "length_ratio": statistics.ratio(
            _column(ppo, "num_tokens"), _column(sft, "num_tokens"), weights
        ),
    }
    ours, theirs = policies["ppo"], policies["sft"]
    ratios = {
        "distinct_2_ratio": _quotient(ours["distinct_2"], theirs["distinct_2"]),
        "perplexity_ratio": _quotient(ours["perplexity"]["value"], theirs["perplexity"]["value"]),
    }
    shares = {
        "win_frac": float(np.mean(wins == 1)),
        "tie_frac": float(np.mean(wins == 0.5)),
        "loss_frac": float(np.mean(wins == 0)),
    }
    return {name: _plain(value) for name, value in estimates.items()} | ratios | shares


def _control(
    records: Sequence[Record], *, sizes: Sequence[int], samples: int, seed: int
) -> dict[str, Any]:
    """Returns best-of-n by size, and PPO against it at equal KL, on the prompts that have draws."""
    drawn = [record for record in records if record.draws]
    if not drawn or not sizes:
        return {"best_of_n": [], "best_of_n_prompts": 0, "equal_kl": None}
    weights = statistics.resample([r.group for r in drawn], samples=samples, seed=seed)
    first = np.array([record.sft.gold for record in drawn])
    rewards = np.array([[draw.reward for draw in record.draws] for record in drawn])
    gold = np.array([[draw.gold for draw in record.draws] for record in drawn])
    rows, points = [], []
    for n in sizes:
        chances = best_weights(rewards, n=n)
        wins = (chances * statistics.outcomes(gold, first[:, None])).sum(1)
        rows.append(
            {
                "n": n,
                "kl_bound": kl_bound(n),
                "gold_win_rate": _plain(statistics.mean(wins, weights)),
                "gold": _plain(statistics.mean((chances * gold).sum(1), weights)),
                "reward": _plain(statistics.mean((chances * rewards).sum(1), weights)),
            }
        )
        points.append(Point(n=n, kl=kl_bound(n), wins=wins))
    ours = statistics.outcomes(np.array([record.ppo.gold for record in drawn]), first)
    kl = float(np.mean([record.kl for record in drawn]))
    equal = at_equal_kl(points, kl=kl, wins=ours, weights=weights)
    return {
        "best_of_n": rows,
        "best_of_n_prompts": len(drawn),
        "equal_kl": dataclasses.asdict(equal) | {"largest_n": max(sizes)},
    }


def _column(replies: Sequence[Judged], name: str) -> Array:
    return np.array([float(getattr(reply, name)) for reply in replies])


def _quotient(ours: float, theirs: float) -> float | None:
    """Returns ours / theirs; None where the other policy has none, such as one-word replies."""
    return ours / theirs if theirs else None


def _plain(estimate: statistics.Estimate) -> dict[str, float]:
    return dataclasses.asdict(estimate)
