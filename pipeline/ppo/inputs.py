"""What PPO reads of the data: prompts, and rows of pretraining text."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from pipeline.corpus import read_corpus
from pipeline.data.formats import read_rows
from pipeline.errors import UserError
from pipeline.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_prompts(
    folder: Path, *, split: str, tokenizer: "PreTrainedTokenizerFast", max_tokens: int
) -> tuple[list[list[int]], int]:
    """Returns a split's prompts as token ids, and how many were dropped as too long.

    Raises:
        UserError: all of them are too long.
    """
    rows = read_rows(folder, "prompts", split=split)
    encoded = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    kept = [tokens for tokens in encoded if len(tokens) <= max_tokens]
    if not kept:
        raise UserError(
            f"{folder}: none of the {len(rows)} {split} prompts has at most {max_tokens} tokens; "
            "raise max_prompt_tokens"
        )
    return kept, len(encoded) - len(kept)


def read_text(
    folder: Path, *, split: str, tokenizer: "PreTrainedTokenizerFast", length: int
) -> Int[Tensor, "row time"]:
    """Returns a split's pretraining text as packed rows of one length."""
    path = folder / f"text-{split}.parquet"
    return read_corpus(path, tokenizer=tokenizer, length=length).rows
