"""The last layer where it is needed: what it makes of prompts is read by nobody.

Keys and values of its attention serve positions that come later. Its queries, what is done with the
attended values, and its feed-forward block serve the position alone, so they are computed for the
positions whose states are wanted; elsewhere they are zeros.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.sizes import filled_up

OWN = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer that read one position and write the same one, where they have these names."""


class _Wanted(threading.local):
    """Positions of the packed rows being read by this thread, and how many there are in all."""

    positions: Int[Tensor, " wanted"] | None = None
    length: int = 0


_WANTED = _Wanted()


@contextlib.contextmanager
def only(positions: Int[Tensor, " wanted"], *, length: int) -> Iterator[None]:
    """Leaves out what spared layers would make of other positions than these of packed rows."""
    _WANTED.positions, _WANTED.length = positions, length
    try:
        yield
    finally:
        _WANTED.positions = None


def spare(body: nn.Module) -> list[RemovableHandle]:
    """Makes the last layer of a body heed `only`; returns what undoes it."""
    stacks = [part for part in body.children() if isinstance(part, nn.ModuleList) and len(part)]
    parts = dict(stacks[0][-1].named_modules()) if stacks else {}
    found = [parts[name] for name in OWN if name in parts]
    taking = [part.register_forward_pre_hook(_take) for part in found]
    return taking + [part.register_forward_hook(_put_back) for part in found]


def _positions_for(part: nn.Module) -> Int[Tensor, " wanted"] | None:
    """Returns what is wanted of a part; in training mode None, which is everything.

    For in that mode alone Transformers checkpoints activations, and what is computed again on the
    way back would not know what was wanted. PPO's roles are never in it.
    """
    return None if part.training else _WANTED.positions


def _take(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    positions = _positions_for(part)
    if positions is None:
        return inputs
    states, *rest = inputs
    return (filled_up(states[0].index_select(0, positions))[None], *rest)


def _put_back(part: nn.Module, _: tuple[Any, ...], made: Tensor) -> Tensor:
    positions = _positions_for(part)
    if positions is None:
        return made
    everywhere = made.new_zeros(1, _WANTED.length, made.shape[-1])
    return everywhere.index_copy(1, positions, made[:, : len(positions)])
