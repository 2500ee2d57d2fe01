"""What the fuzzers share: how hard they run, strange values, and what may come of bad input.

`make fuzz` sets FUZZ_EXAMPLES and runs them hard, with new examples every time; without it each
draws its few examples from a fixed seed. They run in one process, for what pytest's send each
other must not hold half a sign.
"""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pipeline.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples of a fuzzer that runs hard; 0 leaves each its own few."""

ODD_TEXTS = (
    "", " ", "\n", "\0", "a\0b", "\ufeff", "\ud800", "a\udc80b", "e\u0301\u0323", "\u202eabc\u202c",
    "\u05e9\u05dc\u05d5\u05dd", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0010fffd",
    "\u200b", "\u2028", "\x85", "\x1b[31m", "<|end|>", "&amp;amp;lt;", "&#0;", "{{ 7 * 7 }}",
    "%s %n {}", "null", "NaN", "1e999", "../../x", "/dev/null", "-1", "yes", "x" * 3000,
)  # fmt: skip
"""Combining, right to left, joined and astral signs, bytes no text may hold, and look-alikes."""

ODD_NUMBERS = (
    0, -1, 1, 2, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), 0.5,
)  # fmt: skip

texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value, and the three numbers that JSON as Python writes it has beside."""


def fuzz(examples: int, *, share: float = 1.0) -> settings:
    """How many examples a fuzzer draws: a few that never change, or its share of FUZZ_EXAMPLES."""
    return settings(
        max_examples=max(1, int(EXAMPLES * share)) if EXAMPLES else examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def one_line(action: Callable[[], Any]) -> Any:
    """Returns what an action gives, or None where it told a user's mistake in one clear line."""
    try:
        return action()
    except UserError as error:
        assert_clear(str(error))
        return None


def assert_clear(line: str) -> None:
    """A line that a terminal shows as it is, and that a person reads to its end."""
    assert line.strip()
    assert line.isprintable(), ascii(line)
    assert len(line) < 2000, f"{len(line)} characters: {line[:300]}"


def paths_of(document: Any) -> list[tuple[Any, ...]]:
    """Every place in a JSON document, the whole of it first."""
    found: list[tuple[Any, ...]] = [()]
    if isinstance(document, dict | list):
        keys = document if isinstance(document, dict) else range(len(document))
        for key in keys:
            found += [(key, *rest) for rest in paths_of(document[key])]
    return found


@st.composite
def damaged(draw: st.DrawFn, document: Any, value: Any = values) -> Any:
    """A document with one place replaced, left out, or joined by a stranger."""
    place = draw(st.sampled_from(paths_of(document)))
    new = draw(value)
    if not place:
        return new
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    how = draw(st.sampled_from(("replace", "replace", "replace", "leave out", "add")))
    if how == "leave out":
        del inner[place[-1]]
    elif how == "add" and isinstance(inner, dict):
        inner[draw(texts)] = new
    else:
        inner[place[-1]] = new
    return changed


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, lone surrogates as escapes."""
    return json.dumps(value).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that was cut, overwritten, doubled or filled, at a place drawn."""
    start = draw(st.integers(0, 9999)) * len(content) // 9999
    how = draw(st.sampled_from(("cut", "overwrite", "insert", "drop", "double")))
    if how == "cut":
        return content[:start]
    if how == "double":
        return content[:start] + content
    length = draw(st.integers(1, 16))
    if how == "drop":
        return content[:start] + content[start + length :]
    new = draw(st.binary(min_size=length, max_size=length))
    return content[:start] + new + content[start + (length if how == "overwrite" else 0) :]
