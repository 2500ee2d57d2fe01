"""What is done to a text: control characters and spaces mended; nothing reworded."""

import html
import re
import unicodedata

MARKERS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""The tokenizer's special tokens; a text that spells one would be read as structure."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffd]|[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_LONG_NUMBER = re.compile(r"&#[0-9]{4000,};?")
"""An entity that Python refuses to read as a number."""
_NOT_WORD = re.compile(r"[^\w]+|_+")

_TOKEN = re.compile(r"<\|\w{1,40}\|>")
"""How most tokenizers write their special tokens: ours, ChatML's, Llama's, GPT's."""

DEEPEST_ESCAPE = 8
"""Times a text may have been escaped; more is no accident, and would take quadratic time."""
LONGEST_NORMALISED = 2000
"""Signs normalised at once: ordering a run of combining marks takes quadratic time."""


def clean(text: str) -> str:
    """Returns the text with entities resolved (twice-escaped ones too) and single spaces."""
    for _ in range(DEEPEST_ESCAPE):
        escaped, text = text, html.unescape(_LONG_NUMBER.sub(" ", text))
        if text == escaped:
            break
    return _SPACE.sub(" ", _CONTROL.sub(" ", text)).strip()


def tidy(text: str) -> str:
    """Returns the text as its writer laid it out: lines and spaces inside it stay.

    Line ends become one kind, control characters spaces, and the space around it goes.
    """
    return _CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def normalise(text: str) -> str:
    """Returns what two texts share that read the same: lower case, words only.

    A text without any word (an emoticon) stands for itself.
    """
    starts = range(0, len(text), LONGEST_NORMALISED)
    parts = (text[start : start + LONGEST_NORMALISED] for start in starts)
    folded = "".join(unicodedata.normalize("NFKC", part) for part in parts).casefold()
    return _NOT_WORD.sub(" ", folded).strip() or text.strip()


def num_words(text: str) -> int:
    """Number of words between spaces."""
    return len(text.split())


def has_token(text: str) -> bool:
    """Whether the text spells what a tokenizer may read as structure, ours or a borrowed one."""
    return "<|" in text and _TOKEN.search(text) is not None


def has_marker(text: str) -> bool:
    """Whether the text spells one of the special tokens."""
    return "<|" in text and any(marker in text for marker in MARKERS)
