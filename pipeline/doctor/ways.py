"""What code does by the device that it is on: fake tensors are on none."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pipeline import logprobs, sizes
from pipeline.distributed import USE_CPU
from pipeline.doctor.ledger import Ledger
from pipeline.ppo import rollout


@contextlib.contextmanager
def ways_of(ledger: Ledger, *, is_gpu: bool) -> Iterator[None]:
    """Lets code do as it does on a device.

    On a processor blocks of rows follow one another, alike: the first is worked on and counts for
    all. On a GPU all rows are worked on together, and sizes are not rounded up.

    Args:
        ledger: that counts.
        is_gpu: which device.
    """
    with contextlib.ExitStack() as stack:
        if not is_gpu:
            stack.enter_context(on_processor())
            blocks = logprobs.blocks
            stack.enter_context(
                patch.object(logprobs, "blocks", lambda rows: ledger.once_for_all(blocks(rows)))
            )
        else:
            for module, name, way in (
                (logprobs, "blocks", _all_rows),
                (sizes, "rounded", _as_it_is),
                (rollout, "PIECE_NUMBERS", EVERYTHING),
            ):
                stack.enter_context(patch.object(module, name, way))
        yield


@contextlib.contextmanager
def on_processor() -> Iterator[None]:
    """Lets code choose as for a processor, though a GPU may be here."""
    with patch.dict(os.environ, {USE_CPU: "1"}):
        yield


EVERYTHING = 2**62
"""More numbers than any tensor has."""


def _all_rows(logits: Tensor) -> Iterator[slice]:
    yield slice(0, len(logits))


def _as_it_is(count: int, **_: Any) -> int:
    return count
