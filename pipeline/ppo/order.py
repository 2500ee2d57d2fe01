"""The order of rows: by the seed, so that a resumed run reads what is left, and over processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from pipeline.streams import stream


def permutation(seed: int, name: str, *numbers: int, size: int) -> Int[np.ndarray, " size"]:
    """Returns a permutation that is a function of the seed, the stream's name and the numbers."""
    sequence = np.random.SeedSequence([stream(seed, name), *numbers])
    return np.random.Generator(np.random.Philox(sequence)).permutation(size)


def rows_in_turn(seed: int, name: str, *, start: int, size: int, total: int) -> list[int]:
    """Returns `size` rows of an endless reading: each row once per epoch, in a new order each time.

    Args:
        seed: of the run.
        name: the stream, so that two readings never share an order.
        start: rows that were read before.
        size: rows to read.
        total: rows there are.
    """
    rows: list[int] = []
    while len(rows) < size:
        epoch, place = divmod(start + len(rows), total)
        order = permutation(seed, name, epoch, size=total)
        rows += order[place : place + size - len(rows)].tolist()
    return rows


def interleave(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns the rows of all processes in their first order, dealt out one by one."""
    rows: list[Any] = [None] * sum(len(share) for share in shares)
    for rank, share in enumerate(shares):
        rows[rank :: len(shares)] = share
    return rows
