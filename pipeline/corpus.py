"""Documents as packed rows of tokens, for pretraining."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.data.tables import stage_rows
from pipeline.distributed import is_main
from pipeline.errors import UserError
from pipeline.instructions import IGNORED
from pipeline.manifest import mending_command
from pipeline.tokenizer import rendering, tokens_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Text as packed rows, and what it took to make them."""

    rows: "Tensor"
    num_documents: int
    num_tokens: int
    num_dropped: int
    num_bytes: int

    @property
    def tokens_per_byte(self) -> float:
        """Tokens, special ones included, per UTF-8 byte of what people wrote."""
        return self.num_tokens / max(1, self.num_bytes)


def pack(documents: Iterable[Sequence[int]], *, length: int) -> tuple["Tensor", int]:
    """Returns the concatenated documents cut into rows of one length, and the tokens left over."""
    import torch

    stream = torch.tensor([token for document in documents for token in document])
    num_rows = len(stream) // length
    return stream[: num_rows * length].view(num_rows, length), len(stream) - num_rows * length


def read_corpus(
    path: Path,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    length: int,
    setting: str = "sequence_length",
    more: Iterable[str] = (),
) -> Corpus:
    """Returns a file of text rows as packed rows.

    Args:
        path: of the file.
        tokenizer: of the model that will read it.
        length: tokens of a row.
        setting: name of the setting that says so.
        more: plain texts that come behind the file's.

    Raises:
        UserError: there is no such file, or it holds less than a row.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: the data stage put no text rows there. Bring more "
            f"(docs/own-data.md), then run: {mending_command(path.parent)} FORCE=1"
        )
    corpus = _packed(path, tokenizer=tokenizer, length=length, more=more)
    require(bool(len(corpus.rows)), f"{_short_of_a_row(path, corpus)} {setting} {length}")
    return corpus


def read_optional_corpus(
    path: Path, *, tokenizer: "PreTrainedTokenizerFast", length: int, figure: str
) -> Corpus | None:
    """Returns the packed rows for a figure that a stage can leave out.

    None where there is no text; None, and the main process says so, where it is less than a row.
    """
    if not path.is_file():
        return None
    corpus = _packed(path, tokenizer=tokenizer, length=length)
    if len(corpus.rows):
        return corpus
    if is_main():
        log.info("%s %d: %s is left out", _short_of_a_row(path, corpus), length, figure)
    return None


def _packed(
    path: Path, *, tokenizer: "PreTrainedTokenizerFast", length: int, more: Iterable[str] = ()
) -> Corpus:
    documents = [*stage_rows(path, "text"), *({"text": text} for text in more)]
    tokens = encode_documents(tokenizer, documents)
    rows, dropped = pack(tokens, length=length)
    num_bytes = sum(len(text.encode()) for text in texts_of(documents))
    return Corpus(rows, len(documents), sum(map(len, tokens)), dropped, num_bytes)


def _short_of_a_row(path: Path, corpus: Corpus) -> str:
    return f"{path} holds {corpus.num_tokens} tokens, less than one row of"


def texts_of(documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns what people wrote, without the chat template."""
    return [
        text
        for document in documents
        for text in (
            [message["content"] for message in document["messages"]]
            if document.get("messages")
            else [document["text"]]
        )
    ]


def encode_documents(
    tokenizer: "PreTrainedTokenizerFast", documents: Iterable[Mapping[str, Any]]
) -> list[list[int]]:
    """Returns token ids of conversations in the chat template, or of plain texts up to EOS."""
    with rendering(tokenizer):
        rendered = [
            tokenizer.apply_chat_template(document["messages"], tokenize=False)
            if document.get("messages")
            else document["text"].strip() + tokenizer.eos_token
            for document in documents
        ]
    return tokens_of(tokenizer, rendered)


def stack(rows: Sequence["Tensor"]) -> dict[str, "Tensor"]:
    """Returns packed rows as a batch whose every token is a label, but a row's first.

    Nothing predicts that one; Trainer divides a loss by the labels it counts, and of some models
    (GPT-2) it counts the first ones too.
    """
    import torch

    ids = torch.stack(list(rows))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "labels": labels}
