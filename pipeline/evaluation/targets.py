"""What a good run reaches, and the flat figures that are held against it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure and the range it should lie in."""

    name: str
    """Key of the flat figures."""
    title: str
    low: float | None = None
    high: float | None = None

    def met_by(self, value: float) -> bool:
        """Whether the value lies in the range."""
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high)

    @property
    def wanted(self) -> str:
        """The range in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


TARGETS = (
    Target(name="gold_win_rate", title="Gold win rate over SFT", low=0.85),
    Target(name="gold_win_rate_low", title="its 95% interval starts at", low=0.80),
    Target(name="kl", title="KL to SFT, nats per response", high=8.0),
    Target(name="distinct_2_ratio", title="distinct-2, share of SFT's", low=0.85),
    Target(name="length_ratio", title="Mean length, share of SFT's", low=0.75, high=1.25),
    Target(name="eos_frac", title="EOS rate", low=0.95),
    Target(name="perplexity_ratio", title="Perplexity, share of SFT's", high=1.2),
    Target(name="reward_accuracy", title="Reward-model accuracy, mean of sets", low=0.80),
    Target(name="reward_accuracy_over_baseline", title="its least lead over bag-of-words", low=0.0),
)

RUN_TARGETS = (
    Target(name="minutes", title="Minutes of the whole run", high=15.0),
    Target(name="peak_memory_gib", title="Peak memory, GiB", high=6.0),
)


Ranges = Mapping[str, Sequence[float | None]]
"""Lowest and highest good value, None for no bound, by the name of a figure."""


def with_ranges(targets: tuple[Target, ...], ranges: Ranges) -> tuple[Target, ...]:
    """Returns the targets in a recipe's own ranges, where it names any."""
    return tuple(
        replace(target, low=ranges[target.name][0], high=ranges[target.name][1])
        if target.name in ranges
        else target
        for target in targets
    )


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the headline figures of an evaluation under one flat name each.

    Figures that the results lack, such as a ratio without a denominator, are left out.
    """
    comparison, ppo = results["comparison"], results["policies"]["ppo"]
    flat = {
        "gold_win_rate": comparison["gold_win_rate"]["value"],
        "gold_win_rate_low": comparison["gold_win_rate"]["low"],
        "gold_win_rate_high": comparison["gold_win_rate"]["high"],
        "length_controlled_win_rate": comparison["length_controlled_win_rate"]["value"],
        "reward_win_rate": comparison["reward_win_rate"]["value"],
        "gold_sft": results["policies"]["sft"]["gold"]["value"],
        "gold_ppo": ppo["gold"]["value"],
        "kl": comparison["kl"]["value"],
        "distinct_2_ratio": comparison["distinct_2_ratio"],
        "length_ratio": comparison["length_ratio"]["value"],
        "eos_frac": ppo["eos_frac"]["value"],
        "perplexity_ratio": comparison["perplexity_ratio"],
    }
    if results["equal_kl"]:
        flat["lead_over_best_of_n"] = results["equal_kl"]["difference"]["value"]
    if results.get("alignment_tax"):
        flat["text_perplexity_ratio"] = results["alignment_tax"]["ratio"]
    flat |= _reward_figures(results.get("reward_model") or {})
    return {name: float(value) for name, value in flat.items() if value is not None}


def _reward_figures(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns mean accuracy over sets and its smallest lead over the bag of words."""
    leads = [
        one["accuracy"]["value"] - one["bag_of_words"]["value"]
        for one in report.get("sets", {}).values()
        if one.get("accuracy") and one.get("bag_of_words")
    ]
    accuracy = {"reward_accuracy": report.get("mean_accuracy")}
    return accuracy | {"reward_accuracy_over_baseline": min(leads, default=None)}


def judged(flat: Mapping[str, float], targets: tuple[Target, ...]) -> list[dict[str, Any]]:
    """Returns one row per target whose figure is known: title, wanted range, value, whether met."""
    return [
        {
            "name": target.name,
            "title": target.title,
            "wanted": target.wanted,
            "value": flat[target.name],
            "met": target.met_by(flat[target.name]),
        }
        for target in targets
        if target.name in flat
    ]
