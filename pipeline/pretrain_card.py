"""The result of the pretrain stage in words: its closing line, and the card of its folder."""

from collections.abc import Mapping
from typing import Any

from pipeline.corpus import Corpus

OPTIMAL_TOKENS_PER_PARAMETER = 20
"""About what is compute-optimal (Hoffmann et al. 2022, Chinchilla)."""


def headline(summary: Mapping[str, int | float]) -> str:
    """Returns the stage's result in a few words."""
    learned = (
        f"validation loss {summary['loss']:.3f}, perplexity {summary['perplexity']:.1f}, "
        f"{summary['bits_per_byte']:.3f} bits per byte"
    )
    if "measured_in_bits" in summary:
        learned += " in 4 bits"
    if not summary["steps"]:
        return f"{learned}, {summary['parameters']:,} parameters taken as they are"
    return (
        f"{learned}, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['tokens_per_parameter']:.2f} tokens per parameter "
        f"(compute-optimal ~{OPTIMAL_TOKENS_PER_PARAMETER})"
    )


def card(config: Any, summary: Mapping[str, int | float], text: Corpus) -> str:
    """Returns the folder's model card."""
    origin = config.init_from or f"random weights ({config.architecture.model_type})"
    knows = (
        "What it follows already it brought along"
        if config.init_from
        else "It continues conversations in the chat template; it follows no instructions yet"
    )
    bits = "\nFigures are those of the model in 4 bits; what is here is in full precision.\n"
    measured = bits if config.quantise == "4bit" else ""
    return f"""# Pretrained causal language model

Started from {origin}; {summary["parameters"]:,} parameters, {summary["steps"]} steps on
{summary["tokens_seen"]:,} tokens ({summary["epochs"]:.2f} passes over {text.num_documents:,}
documents of {text.num_tokens:,} tokens, packed into rows of {config.sequence_length};
{text.num_dropped} tokens left over).

| figure | value |
|---|---|
| validation loss, nats per token | {summary["loss"]:.4f} |
| perplexity | {summary["perplexity"]:.2f} |
| bits per byte | {summary["bits_per_byte"]:.4f} |
| tokens per parameter | {summary["tokens_per_parameter"]:.2f} |
| compute-optimal tokens per parameter (Hoffmann et al. 2022) | ~{OPTIMAL_TOKENS_PER_PARAMETER} |
{measured}
{knows} (what comes next is `sft`).
"""
