"""What a user writes as settings: checked before anything is made of it, and what was made.

In YAML a few lines can stand for billions of values (aliases of aliases), a key can stand twice and
the first be forgotten, and numbers can be none; no setting of ours means any of that.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MOST_VALUES = 10_000
"""Values of one text with its aliases written out; our longest recipe has about 60."""
LARGEST_INTEGER = 2**53
"""Beyond it a whole number is not the same in every library that reads it."""


def check_yaml(path: Path, *, may_be_empty: bool = True) -> None:
    """Checks a file of settings.

    Raises:
        UserError: it is no YAML of `setting: value` lines, a key stands twice, aliases stand for
            too much, or it is empty and may not be.
    """
    try:
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML in UTF-8 ({error})") from error
    if not isinstance(root, yaml.MappingNode | None) or not (root or may_be_empty):
        raise UserError(f"{path} must hold lines of `setting: value`")
    _check_size(root, where=str(path))
    for mapping in _mappings(root):
        keys = [(key.tag, key.value) for key, _ in mapping.value]
        for place, (key, _) in enumerate(mapping.value):
            if (key.tag, key.value) in keys[:place]:
                line = key.start_mark.line + 1
                raise UserError(f"{path} line {line}: {key.value} stands there a second time")


def check_words(values: Iterable[str]) -> None:
    """Checks what the command line gives as values; what is no YAML there is a text.

    Raises:
        UserError: aliases stand for too much.
    """
    for text in values:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            continue
        except RecursionError as error:
            raise UserError("a value on the command line is nested too deeply") from error
        _check_size(root, where="a value on the command line")


def check_values(value: Any, *, name: str = "") -> None:
    """Checks that every value of a configuration can be written down, and read as the same again.

    Raises:
        UserError: a number that is none or too large, a text that is no UTF-8 or holds a NUL, or
            something else; the setting is named.
    """
    for inner_name, inner in _parts(value):
        check_values(inner, name=f"{name}.{inner_name}".lstrip("."))
    if isinstance(value, str):
        if "\0" in value or not _is_utf8(value):
            raise UserError(f"{name}: {value!r} holds a sign that no text may hold")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: must be a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise UserError(f"{name}: {value:.3g} is too large")


def _parts(value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [(str(place), inner) for place, inner in enumerate(value)]
    return []


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _check_size(root: Any, *, where: str) -> None:
    """Raises UserError where a node stands for too many values, or for itself among them."""
    sizes: dict[int, int] = {}

    def measure(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES + 1  # until it is known
            sizes[id(node)] = 1 + sum(map(measure, _inside(node)))
        return sizes[id(node)]

    if measure(root) > MOST_VALUES:
        raise UserError(
            f"{where}: aliases stand for more than {MOST_VALUES:,} values; write the values out"
        )


def _mappings(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        yield node
    for inner in _inside(node):
        yield from _mappings(inner)


def _inside(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
