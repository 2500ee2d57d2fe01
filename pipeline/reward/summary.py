"""The reward stage's headline figures and model card."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

METHODS = ("accuracy", "bag_of_words", "longer_wins", "one_human_rater")


def summarise(
    report: Mapping[str, Any], model_config: "PreTrainedConfig", counts: Mapping[str, int | float]
) -> dict[str, Any]:
    """Returns the headline figures as plain JSON values."""
    summary: dict[str, Any] = {
        "accuracy": report["mean_accuracy"],
        "reward_mean": model_config.reward_mean,
        "reward_std": model_config.reward_std,
        **counts,
    }
    for name, one in report["sets"].items():
        for method in METHODS if one["num_pairs"] else ():
            value = one[method]
            summary[f"{method}_{name}"] = value["value"] if isinstance(value, dict) else value
    return summary


def headline(summary: Mapping[str, Any]) -> str:
    """Returns the stage's result in a few words."""
    names = [key.removeprefix("accuracy_") for key in summary if key.startswith("accuracy_")]
    parts = [
        f"{name} {summary[f'accuracy_{name}']:.3f}"
        + (f" (bag of words {words:.3f})" if (words := summary[f"bag_of_words_{name}"]) else "")
        for name in names
    ]
    return "validation pair accuracy " + (", ".join(parts) or "unknown: no comparable pairs")


def card(summary: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Returns the folder's model card."""
    lines = [_row(name, one) for name, one in report["sets"].items() if one["num_pairs"]]
    return f"""# Reward model

A sequence classifier with one label, read at the last token of prompt + response (EOS). Trained
with the Bradley-Terry loss on {summary["comparisons"]:,} comparisons of {summary["texts"]:,}
rated texts in {summary["rankings"]:,} rankings ({summary["steps"]} steps; left out as too long:
{summary["texts_dropped"]} texts).

Normalised score = (raw - {summary["reward_mean"]:.4f}) / {summary["reward_std"]:.4f}: mean 0 and
standard deviation 1 over the SFT model's own replies to training prompts.

Validation accuracy on all pairs of a set whose mean ratings differ by at least
{report["min_gap"]}, with 95% interval from a bootstrap over texts:

| set | pairs | reward model | bag of words | longer wins | one human rater |
|---|---|---|---|---|---|
{chr(10).join(lines)}

It scores what people rate as positive in short texts; it says nothing about helpfulness or truth.
"""


def _row(name: str, one: Mapping[str, Any]) -> str:
    accuracy = one["accuracy"]
    cells = [
        name,
        f"{one['num_pairs']:,}",
        f"{accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})",
        *(_figure(one[method]) for method in METHODS[1:]),
    ]
    return "| " + " | ".join(cells) + " |"


def _figure(value: Any) -> str:  # an estimate, a number or None
    if value is None:
        return "-"
    return f"{value['value'] if isinstance(value, dict) else value:.3f}"
