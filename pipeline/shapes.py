"""What a JSON document must hold, put together from tests of its places.

A shape is a function: it returns the name of the first place of a value that is missing or holds
something else, or None where all is well.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any], str | None]

DEEPEST = 40
"""Levels of a document; deeper ones would stop Python where they are written again."""


def holds(test: Callable[[Any], bool]) -> Shape:
    """Returns the shape of a value that passes a test."""
    return lambda value: None if test(value) else ""


def mapping(places: Mapping[str, Shape]) -> Shape:
    """Returns the shape of a mapping with these places, others being free.

    Args:
        places: shapes by name; a place whose name ends in `?` may be missing.
    """

    def fault(value: Any) -> str | None:
        if not isinstance(value, dict):
            return ""
        for key, shape in places.items():
            name = key.removesuffix("?")
            inner = shape(value[name]) if name in value else _missing(key)
            if inner is not None:
                return f"{name}.{inner}".rstrip(".")
        return None

    return fault


def each(shape: Shape) -> Shape:
    """Returns the shape of a mapping whose every place has one shape."""

    def fault(value: Any) -> str | None:
        return mapping(dict.fromkeys(value, shape))(value) if isinstance(value, dict) else ""

    return fault


def _missing(key: str) -> str | None:
    return None if key.endswith("?") else ""


def is_object(value: Any) -> bool:
    """Whether it is a mapping that can be written again: not too deep, and of texts in UTF-8."""
    return isinstance(value, dict) and _can_be_written(value, DEEPEST)


def is_text(value: Any) -> bool:
    """Whether it is a text in UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_amount(value: Any) -> bool:
    """Whether it is a finite number from 0 on."""
    return is_number(value) and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) < math.inf


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def are_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(map(is_text, value))


def _can_be_written(value: Any, levels: int) -> bool:
    if isinstance(value, str):
        return is_text(value)
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return True
    return levels > 0 and all(_can_be_written(one, levels - 1) for one in inner)
