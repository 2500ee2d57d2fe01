"""The alignment tax: what a policy has forgotten of the text it was pretrained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.corpus import read_optional_corpus, stack
from pipeline.language_loss import nll_as_it_is
from pipeline.logprobs import perplexity
from pipeline.spacing import evenly_spaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS = 8
"""Most rows of one forward pass."""
LOGITS = 2**29
"""Most logits of one, which exist all at once: 2 GB in float32."""


def alignment_tax(
    sft: Any,
    ppo: Any,
    *,
    text: Path,
    tokenizer: "PreTrainedTokenizerFast",
    length: int,
    num_rows: int,
) -> dict[str, float] | None:
    """Returns both policies' perplexity on held-out text, and PPO's as a share of SFT's.

    Ouyang et al. 2022, section 4.2, who measure it on tasks. Every process must call it: they share
    the rows. None where the run has no text, or less than a row.

    Args:
        sft: causal LM in evaluation mode, or a role that reads through one.
        ppo: the same, of the same vocabulary.
        text: file of text rows of a split that no stage has read.
        tokenizer: of both.
        length: tokens of a packed row, at least 2.
        num_rows: rows that are read, evenly spaced; fewer where there are fewer.
    """
    corpus = read_optional_corpus(
        text, tokenizer=tokenizer, length=length, figure="the alignment tax"
    )
    if corpus is None:
        return None
    chosen = [corpus.rows[index] for index in evenly_spaced(len(corpus.rows), num_rows)]
    size = rows_per_pass(length, vocabulary=sft.config.vocab_size)
    batches = [stack(chosen[i : i + size]) for i in range(0, len(chosen), size)]
    before, after = (perplexity(nll_as_it_is(model, batches)[0]) for model in (sft, ppo))
    return {"sft": before, "ppo": after, "ratio": after / before}


def rows_per_pass(length: int, *, vocabulary: int) -> int:
    """Returns how many rows of so many tokens are read together."""
    return max(1, min(ROWS, LOGITS // (length * vocabulary)))
