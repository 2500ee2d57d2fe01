"""The tokenizer: byte-level BPE training, the chat template, the one text path of all stages."""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.cleaning import MARKERS
from pipeline.errors import told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PAD, END, SYSTEM, USER, ASSISTANT = MARKERS
SMALLEST_VOCABULARY = 256 + len(MARKERS)
"""Every byte and every special token: with these, no text is unknown."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
"""`<|role|>content<|end|>` for each message; a reply and its end lie between generation markers."""

_LONG_WORD = re.compile(r"(\S{1000})(?=\S)")
"""What is parted for the training: it takes time quadratic in the length of a word."""

Prompt = str | Sequence[dict[str, str]]


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> "Tokenizer":
    """Returns a byte-level BPE tokenizer trained on the texts, special tokens and template set.

    The vocabulary is smaller than asked for where the texts have no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_LONG_WORD.sub(r"\1 ", text) for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def encode_prompt(tokenizer: "Tokenizer", prompt: Prompt) -> list[int]:
    """Returns the prompt's token ids in the chat template, up to where a reply begins.

    Args:
        tokenizer: any tokenizer with a chat template.
        prompt: a user's text, or messages that end with the user's.
    """
    with rendering(tokenizer):
        ids = tokenizer.apply_chat_template(
            messages_of(prompt), tokenize=True, add_generation_prompt=True, return_dict=False
        )
    return list(ids)


def render_prompt(tokenizer: "Tokenizer", prompt: Prompt) -> str:
    """Returns the prompt's text in the chat template, up to where a reply begins."""
    with rendering(tokenizer):
        return str(
            tokenizer.apply_chat_template(
                messages_of(prompt), tokenize=False, add_generation_prompt=True
            )
        )


@contextlib.contextmanager
def rendering(tokenizer: "Tokenizer") -> Iterator[None]:
    """Turns what a chat template fails at into one line; Transformers renders it in a sandbox.

    Raises:
        UserError: the template refuses the conversation, is broken, or reaches for Python.
    """
    with told(
        f"{tokenizer.name_or_path}: its chat template fails",
        mend="Mend chat_template.jinja there, or the rows that it refuses",
    ):
        yield


def encode_response(tokenizer: "Tokenizer", response: str | Sequence[dict[str, str]]) -> list[int]:
    """Returns the reply's token ids, EOS included: what the policy is meant to write.

    Args:
        tokenizer: any tokenizer with an EOS token.
        response: a text, or the assistant's message in a list of one.
    """
    text = response if isinstance(response, str) else response[0]["content"]
    return [*tokens_of(tokenizer, [reply_text(tokenizer, text)])[0], tokenizer.eos_token_id]


def reply_text(tokenizer: "Tokenizer", text: str) -> str:
    """Returns a reply as it follows its prompt: after the white space that the template has there.

    A template without tokens between the two, as in "TL;DR: a summary", needs the space: the words
    of a text are other tokens without it.
    """
    return _space_before(tokenizer, tokenizer.chat_template) + text.strip()


@functools.lru_cache(maxsize=8)
def _space_before(tokenizer: "Tokenizer", template: str | None) -> str:
    if not template:
        return ""
    prompt, reply = messages_of("a"), {"role": "assistant", "content": "b"}
    before = render_prompt(tokenizer, prompt)
    with rendering(tokenizer):
        whole = str(tokenizer.apply_chat_template([*prompt, reply], tokenize=False))
    space = whole[len(before) :].partition("b")[0]
    return space if whole.startswith(before) and space.isspace() else ""


def tokens_of(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts as they stand, without special tokens.

    Raises:
        UserError: one is no text that a tokenizer reads: it holds half of a surrogate pair.
    """
    with told(f"{tokenizer.name_or_path}: its tokenizer fails", mend="Mend the rows of the data"):
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def encode_conversation(
    tokenizer: "Tokenizer", messages: Sequence[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """Returns a conversation's token ids, and True for each the assistant writes, EOS included."""
    with rendering(tokenizer):
        encoded = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    return list(encoded["input_ids"]), [bool(value) for value in encoded["assistant_masks"]]


def decode_response(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    """Returns the reply's text: everything before the first EOS, without special tokens."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Returns a prompt as messages: a text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
