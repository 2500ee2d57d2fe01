"""What is done to every text: entities, control characters and spaces mended; nothing reworded."""

import html
import re
import unicodedata

MARKERS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""The tokenizer's special tokens; a text that spells one would be read as structure."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffd]|[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_NOT_WORD = re.compile(r"[^\w]+|_+")


def clean(text: str) -> str:
    """Returns the text with entities resolved (twice-escaped ones too) and single spaces."""
    while (resolved := html.unescape(text)) != text:
        text = resolved
    return _SPACE.sub(" ", _CONTROL.sub(" ", text)).strip()


def normalise(text: str) -> str:
    """Returns what two texts share that read the same: lower case, words only.

    A text without any word (an emoticon) stands for itself.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip() or text.strip()


def num_words(text: str) -> int:
    """Number of words between spaces."""
    return len(text.split())


def has_marker(text: str) -> bool:
    """Whether the text spells one of the special tokens."""
    return "<|" in text and any(marker in text for marker in MARKERS)
