"""Progress bars: shown on the main process, with rate and time left."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from pipeline.distributed import is_main

T = TypeVar("T")

_HIDDEN = ContextVar("hidden", default=False)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Shows no bars of what is done within, as where work is only rehearsed."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def progress(
    items: Iterable[T], *, total: int, description: str, initial: int = 0, leave: bool = True
) -> Iterator[T]:
    """Yields the items while a bar shows how many are done, their rate and the time left.

    Args:
        items: what is worked through.
        total: how many there are, those done before included.
        description: what is done to them.
        initial: how many were done before.
        leave: whether the bar stays when all are done; False for what is part of other work.
    """
    from tqdm import tqdm

    yield from tqdm(
        items,
        total=total,
        initial=initial,
        desc=description,
        disable=_HIDDEN.get() or not is_main(),
        dynamic_ncols=True,
        leave=leave,
        mininterval=0.5,
    )
