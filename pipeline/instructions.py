"""Instructions as tokens: which are read, which are learned, and batches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.tables import stage_rows
from pipeline.errors import UserError
from pipeline.manifest import mending_command
from pipeline.tokenizer import encode_conversation, rendering, reply_text, tokens_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of a token that is read but not learned."""


@dataclass(frozen=True)
class Example:
    """One row: what is read, and which of it is learned."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Examples:
    """The rows of a split that fit, and the number of those too long."""

    rows: list[Example]
    num_dropped: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.input_ids) for row in self.rows]


def read_examples(path: Path, *, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> Examples:
    """Returns a file of instruction rows as tokens, without rows longer than max_length."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: the data stage put no instructions there. Bring more "
            f"(docs/own-data.md), then run: {mending_command(path.parent)} FORCE=1"
        )
    rows = list(stage_rows(path, "instructions"))
    examples = encode_rows(tokenizer, rows)
    fitting = [example for example in examples if len(example.input_ids) <= max_length]
    if not fitting:
        raise UserError(f"max_length: none of the {len(rows)} rows of {path} fits in {max_length}")
    return Examples(fitting, len(rows) - len(fitting))


def encode_rows(
    tokenizer: "PreTrainedTokenizerFast", rows: Sequence[Mapping[str, Any]]
) -> list[Example]:
    """Returns instructions as tokens whose labels cover the assistant's reply and its EOS.

    A row with `messages` learns every assistant turn; one with `prompt` and `completion` learns
    the completion.
    """
    whole = [row["messages"] for row in rows if row.get("messages")]
    pairs = [row for row in rows if not row.get("messages")]
    return _encode_conversations(tokenizer, whole) + _encode_pairs(tokenizer, pairs)


def _encode_conversations(
    tokenizer: "PreTrainedTokenizerFast", conversations: Sequence[list[dict[str, str]]]
) -> list[Example]:
    examples = []
    for messages in conversations:
        ids, learned = encode_conversation(tokenizer, messages)
        if not any(learned):
            raise UserError("the chat template marks nothing that the assistant writes")
        labels = [i if learn else IGNORED for i, learn in zip(ids, learned, strict=True)]
        examples.append(Example(ids, labels))
    return examples


def _encode_pairs(
    tokenizer: "PreTrainedTokenizerFast", pairs: Sequence[Mapping[str, Any]]
) -> list[Example]:
    """Encodes many pairs at once: the same tokens as encode_prompt and encode_response."""
    if not pairs:
        return []
    replies = [reply_text(tokenizer, _text(pair["completion"])) for pair in pairs]
    with rendering(tokenizer):
        prompts = tokenizer.apply_chat_template(
            [_messages(pair["prompt"]) for pair in pairs],
            add_generation_prompt=True,
            tokenize=False,
        )
    prompt_ids, reply_ids = tokens_of(tokenizer, prompts), tokens_of(tokenizer, replies)
    end = [tokenizer.eos_token_id]
    return [
        Example(prompt + reply + end, [IGNORED] * len(prompt) + reply + end)
        for prompt, reply in zip(prompt_ids, reply_ids, strict=True)
    ]


def _messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _text(completion: Any) -> str:  # a text, a message, or a list of one message
    message = completion[0] if isinstance(completion, list) else completion
    return message if isinstance(message, str) else message["content"]


def collate(rows: Sequence[Mapping[str, list[int]]], *, pad_id: int) -> dict[str, "Tensor"]:
    """Returns rows padded on the right, with labels -100 on padding."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in values])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, pad_id),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }
