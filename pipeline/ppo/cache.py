"""Attention's cache with room for what is still to come: no step copies what went before."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from pipeline.attention import kept_in

States = Float[Tensor, "row head _ _"]


def make_room(cache: Any, *, positions: int, attention: str = "sdpa") -> None:
    """Gives every growing attention layer of a cache room for more positions.

    Layers of another kind (sliding windows, recurrent states) stay as they are.

    Args:
        cache: what a model returned after reading the prompts.
        positions: how many more each layer is to hold.
        attention: name of what reads it, which decides in what precision it keeps them.
    """
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            layers[index] = RoomyLayer(layer, positions=positions, attention=attention)


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the filled part of larger tensors."""

    def __init__(self, layer: DynamicLayer, *, positions: int, attention: str) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.rooms = [
            _with_room(part, positions, kept_in(attention, part))
            for part in (layer.keys, layer.values)
        ]
        self._fill(layer.get_seq_length())

    def update(
        self, key_states: States, value_states: States, *_: Any, **__: Any
    ) -> tuple[States, States]:
        """Writes new states behind the last and returns all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self._fill(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Keeps these rows only."""
        length = self.get_seq_length()
        self.rooms = [room[indices] for room in self.rooms]
        self._fill(length)

    def _fill(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)


def _with_room(states: States, positions: int, dtype: torch.dtype) -> States:
    rows, heads, length, width = states.shape
    room = states.new_empty(rows, heads, length + positions, width, dtype=dtype)
    room[:, :, :length] = states
    return room
