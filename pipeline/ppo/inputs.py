"""What PPO reads of the data: prompts, and rows of pretraining text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from pipeline.config import require
from pipeline.corpus import read_corpus, read_optional_corpus
from pipeline.data.formats import read_rows
from pipeline.distributed import world_size
from pipeline.errors import UserError
from pipeline.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prompts:
    """The prompts of a split that fit.

    Attributes:
        tokens: token ids, up to where a reply begins.
        texts: the same as they stand in the data: a user's text, or messages.
        num_dropped: prompts that were too long.
    """

    tokens: list[list[int]]
    texts: list[Any]
    num_dropped: int


def read_prompts(
    folder: Path, *, split: str, tokenizer: "PreTrainedTokenizerFast", max_tokens: int
) -> Prompts:
    """Returns a split's prompts, without those of more than max_tokens tokens.

    Raises:
        UserError: all of them are too long.
    """
    rows = read_rows(folder, "prompts", split=split)
    encoded = [(encode_prompt(tokenizer, row["prompt"]), row["prompt"]) for row in rows]
    kept = [(tokens, text) for tokens, text in encoded if len(tokens) <= max_tokens]
    if not kept:
        raise UserError(
            f"{folder}: none of the {len(rows)} {split} prompts has at most {max_tokens} tokens; "
            "raise max_prompt_tokens"
        )
    tokens, texts = (list(column) for column in zip(*kept, strict=True))
    return Prompts(tokens, texts, len(encoded) - len(kept))


def read_inputs(
    folder: Path,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    max_tokens: int,
    text_length: int,
    ptx: bool,
) -> tuple[dict[str, Prompts], dict[str, Int[Tensor, "row time"]]]:
    """Returns the prompts of training and validation, and the rows of text, by split.

    Args:
        folder: of the data stage.
        tokenizer: the policy's.
        max_tokens: longer prompts are dropped.
        text_length: tokens of a row of text.
        ptx: whether training text is read too; validation text is, where there is any.

    Raises:
        UserError: there are fewer validation prompts than processes, or PPO-ptx has no text.
    """
    splits = {
        split: read_prompts(folder, split=split, tokenizer=tokenizer, max_tokens=max_tokens)
        for split in ("train", "validation")
    }
    fitting = len(splits["validation"].tokens)
    require(
        fitting >= world_size(),
        f"validation_prompts: only {fitting} fit into max_prompt_tokens, fewer than the processes",
    )
    return splits, read_text(folder, tokenizer=tokenizer, length=text_length, ptx=ptx)


def read_text(
    folder: Path, *, tokenizer: "PreTrainedTokenizerFast", length: int, ptx: bool
) -> dict[str, Int[Tensor, "row time"]]:
    """Returns the rows of text by split: those of validation where there are any.

    Raises:
        UserError: PPO-ptx has no row of training text.
    """
    validation = read_optional_corpus(
        folder / "text-validation.parquet",
        tokenizer=tokenizer,
        length=length,
        figure="validation/text_perplexity",
    )
    text = {} if validation is None else {"validation": validation.rows}
    if ptx:
        path, setting = folder / "text-train.parquet", "max_prompt_tokens + max_response_tokens"
        train = read_corpus(path, tokenizer=tokenizer, length=length, setting=setting)
        text["train"] = train.rows
    return text
