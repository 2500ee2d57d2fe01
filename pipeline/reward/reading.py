"""How a reward model reads a prompt and a response, whoever's tokens they were.

A model of the run's own tokenizer reads the policy's tokens as they are. Every other one gets the
text anew: by its chat template, or, where it has none (encoders), as a pair of texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config import require
from pipeline.context import context_of
from pipeline.errors import told
from pipeline.pretrained import from_pretrained
from pipeline.tokenizer import (
    Prompt,
    decode_response,
    encode_prompt,
    encode_response,
    messages_of,
    rendering,
    tokens_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Exchange(NamedTuple):
    """Token ids of prompt + response, and the place of the first response token."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class TokenReading:
    """Reads what the policy writes: the template up to the reply, the reply, EOS.

    `separator` of a reading is the token after which a second segment begins; None without any.
    """

    tokenizer: "Tokenizer"
    separator: int | None = None
    prompts: dict[str, list[int]] = field(default_factory=dict)
    """Prompts that were read before: many texts answer the same one."""

    def exchange(self, prompt: Prompt, response: str, *, ended: bool = True) -> Exchange:
        """Returns what the model reads of a response that has ended, or was cut at its budget."""
        if str(prompt) not in self.prompts:
            self.prompts[str(prompt)] = encode_prompt(self.tokenizer, prompt)
        start, reply = self.prompts[str(prompt)], encode_response(self.tokenizer, response)
        return Exchange(start + (reply if ended else reply[:-1]), len(start))


@dataclass(frozen=True)
class ChatReading:
    """Reads a conversation by the model's own chat template, and nothing but the template."""

    tokenizer: "Tokenizer"
    separator: int | None = None

    def exchange(self, prompt: Prompt, response: str, *, ended: bool = True) -> Exchange:
        """Returns what the model reads; a response that did not end is not closed."""
        before = encode_prompt(self.tokenizer, prompt)
        if not ended:
            reply = tokens_of(self.tokenizer, [response])[0]
            return Exchange([*before, *reply], len(before))
        conversation = [*messages_of(prompt), {"role": "assistant", "content": response}]
        with rendering(self.tokenizer):
            ids = self.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
        start = 0
        while start < min(len(ids), len(before)) and ids[start] == before[start]:
            start += 1
        return Exchange(list(ids), start)


@dataclass(frozen=True)
class PairReading:
    """Reads prompt and response as a pair of texts: [CLS] prompt [SEP] response [SEP]."""

    tokenizer: "Tokenizer"

    @property
    def separator(self) -> int | None:
        """[SEP] where the tokenizer gives the second text a segment of its own (BERT)."""
        pair = self.tokenizer("a", "b")
        marked = 1 in pair.get("token_type_ids", [])
        return self.tokenizer.sep_token_id if marked else None

    def exchange(self, prompt: Prompt, response: str, *, ended: bool = True) -> Exchange:
        """Returns what the model reads; turns of a conversation are lines of the first text."""
        text = "\n".join(message["content"].strip() for message in messages_of(prompt))
        pair = self.tokenizer([(text, response.strip())])  # not alone: "" would be no second text
        ids, texts = list(pair["input_ids"][0]), pair.sequence_ids(0)
        start = texts.index(1) if 1 in texts else len(ids) - 1
        return Exchange(ids if ended else ids[:-1], start)


Reading = TokenReading | ChatReading | PairReading


def load_reading(path: Path | str) -> Reading:
    """Returns how the model in a folder reads text, by its own tokenizer.

    Raises:
        UserError: no tokenizer, no padding of its own, or neither a chat template nor pairs.
    """
    from transformers import AutoTokenizer

    with told(f"{path}: no tokenizer could be loaded from there"):
        tokenizer = from_pretrained(AutoTokenizer, path, weights=False)
    require(
        tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id,
        f"{path}: the tokenizer's PAD must be a token of its own, not EOS",
    )
    if tokenizer.chat_template is not None:
        return ChatReading(tokenizer)
    require(
        tokenizer.num_special_tokens_to_add(pair=True) >= 2,
        f"{path}: the tokenizer has no chat template, and no special tokens for a pair of texts",
    )
    return PairReading(tokenizer)


@dataclass(frozen=True)
class Text:
    """A row of a rollout in words."""

    prompt: list[dict[str, str]]
    """Messages, the user's last."""
    response: str
    ended: bool


@dataclass(frozen=True)
class Words:
    """What the policy's tokens say.

    Attributes:
        tokenizer: the policy's.
        prompts: every prompt by its token ids, as it stood in the data: nothing is decoded.
    """

    tokenizer: "Tokenizer"
    prompts: Mapping[tuple[int, ...], Prompt]

    @classmethod
    def behind(
        cls, tokens: Sequence[list[int]], prompts: Sequence[Prompt], *, tokenizer: "Tokenizer"
    ) -> "Words":
        """Returns the words behind the tokens of prompts."""
        return cls(tokenizer, dict(zip(map(tuple, tokens), prompts, strict=True)))

    def of(self, prompt: Sequence[int], response: Sequence[int]) -> Text:
        """Returns the words of one row."""
        ended = bool(response) and response[-1] == self.tokenizer.eos_token_id
        said = decode_response(self.tokenizer, response)
        return Text(messages_of(self.prompts[tuple(prompt)]), said, ended)


def reread(
    reading: Reading, words: Words, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> list[list[int]]:
    """Returns rows of policy tokens as token ids of a reward model."""
    if isinstance(reading, TokenReading):
        return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    texts = [words.of(*row) for row in zip(prompts, responses, strict=True)]
    return [reading.exchange(text.prompt, text.response, ended=text.ended).ids for text in texts]


def limit_of(config: Any, tokenizer: "Tokenizer") -> int:
    """Returns the most tokens that a model reads: by its tokenizer, or by its configuration."""
    limit = int(tokenizer.model_max_length)
    return min(limit, context_of(config) or limit)


def cut_to(texts: Sequence[list[int]], *, limit: int) -> list[list[int]]:
    """Returns the texts within so many tokens: of a longer one its first token and its end."""
    return [ids if len(ids) <= limit else ids[:1] + ids[1 - limit :] for ids in texts]
