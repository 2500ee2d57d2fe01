"""Progress bars: shown on the main process, with rate and time left."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipeline.distributed import is_main

T = TypeVar("T")


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
        disable=not is_main(),
        dynamic_ncols=True,
        leave=leave,
        mininterval=0.5,
    )
