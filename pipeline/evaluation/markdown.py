"""The results of an evaluation in words: headline and the card of its folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.targets import TARGETS, figures, judged, with_ranges

ABOUT = (
    "Gold score: the VADER compound of a reply, so the figures say how positive replies read, "
    "not how helpful they are. Intervals are 95%, bootstrap over conversations."
)


def headline(flat: Mapping[str, float]) -> str:
    """Returns the closing line's figures."""
    return (
        f"PPO over SFT: gold win rate {flat['gold_win_rate']:.3f} "
        f"({flat['gold_win_rate_low']:.3f} to {flat['gold_win_rate_high']:.3f}) "
        f"at KL {flat['kl']:.2f} nats"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; bars and line ends inside a cell are made harmless."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def interval(estimate: Mapping[str, float], *, digits: int = 3) -> str:
    """Returns an estimate as `value (low to high)`."""
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def equal_kl_sentence(equal: Mapping[str, Any] | None) -> str:
    """Returns by how much PPO does or does not beat best-of-n at equal KL."""
    if not equal:
        return "Best-of-n was not measured."
    lead = equal["difference"]["value"]
    verdict = "beats" if lead > 0 else "does not beat"
    place = (
        f"best-of-n at its own KL of {equal['kl']:.2f} nats"
        if equal["within_range"]
        else f"best-of-{equal['largest_n']}, the largest measured, although its KL of "
        f"{equal['kl']:.2f} nats lies beyond that one's bound"
    )
    return (
        f"PPO {verdict} {place}: gold win rate {lead:+.3f} "
        f"({equal['difference']['low']:+.3f} to {equal['difference']['high']:+.3f}) "
        f"against {equal['best_of_n']['value']:.3f}."
    )


def results_markdown(results: Mapping[str, Any]) -> str:
    """Returns the card: what was measured, targets, both policies, best-of-n."""
    rows = judged(figures(results), with_ranges(TARGETS, results.get("targets", {})))
    targets = [
        [row["title"], row["wanted"], f"{row['value']:.3f}", "yes" if row["met"] else "no"]
        for row in rows
    ]
    control = [
        [str(row["n"]), f"{row['kl_bound']:.2f}", interval(row["gold_win_rate"])]
        for row in results["best_of_n"]
    ]
    return "\n\n".join(
        [
            "# SFT against PPO",
            " ".join([ABOUT, *_which_models(results)]),
            table(["figure", "target", "value", "met"], targets),
            table(
                ["", "SFT", "PPO"],
                _policy_rows(results["policies"]) + _tax_row(results["alignment_tax"]),
            ),
            table(["best of n", "KL bound", "gold win rate"], control) if control else "",
            equal_kl_sentence(results["equal_kl"]),
        ]
    )


def _which_models(results: Mapping[str, Any]) -> list[str]:
    """Returns sentences where models are not the last ones, or not read as their folders hold them.

    Results of former versions do not say which policy it was: the last.
    """
    told = []
    if results.get("policy") == "best":
        told.append(
            "PPO is `ppo/best`, the policy that the guard liked best on validation prompts."
        )
    if "on_one_base" in results:
        bits = "" if results["on_one_base"] == "none" else ", in 4 bits as the pretrained model was"
        told.append(f"SFT, PPO and the reward model were read as adapters on one base{bits}.")
    return told


def _policy_rows(policies: Mapping[str, Any]) -> list[list[str]]:
    sft, ppo = policies["sft"], policies["ppo"]
    estimated = {
        "gold score": "gold",
        "reward-model score": "reward",
        "tokens per reply": "length_tokens",
        "EOS rate": "eos_frac",
        "perplexity under pretrain": "perplexity",
    }
    plain = {
        "words per reply": "length_words",
        "distinct-2": "distinct_2",
        "share of the commonest reply": "commonest_reply_frac",
        "share of distinct replies": "distinct_reply_frac",
    }
    rows = [[title, interval(sft[key]), interval(ppo[key])] for title, key in estimated.items()]
    return rows + [[t, f"{sft[key]:.3f}", f"{ppo[key]:.3f}"] for t, key in plain.items()]


def _tax_row(tax: Mapping[str, float] | None) -> list[list[str]]:
    title = "perplexity on held-out text (the alignment tax)"
    return [[title, f"{tax['sft']:.2f}", f"{tax['ppo']:.2f}"]] if tax else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
