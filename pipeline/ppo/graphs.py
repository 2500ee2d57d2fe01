"""Decoding in steps of one shape, which a GPU replays as one CUDA graph.

A step of decoding is some hundred kernels, and a GPU is done with each before Python has started
the next. A graph starts them all at once, but reads and writes where it did when it was captured:
so the cache has room for everything from the start, a mask as wide says what counts of it, and
counters lie on the device. A processor can take the same steps, without a graph; growing tensors
are faster there.
"""

import contextlib
import logging
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, StaticLayer

from pipeline.attention import attention_of, is_packed

log = logging.getLogger(__name__)

WARM_UPS = 2
"""Steps before a capture: libraries allocate and choose their kernels in the first ones."""


def prefers_one_shape(model: Any) -> bool:
    """Returns whether steps of one shape are the faster ones: on GPUs."""
    return bool(model.device.type == "cuda")


def can_keep_one_shape(model: Any, cache: Any) -> bool:
    """Returns whether a model's steps can keep one shape: all its layers attend to all before.

    Sliding windows and recurrent states have caches of other kinds, and a mask that is made
    beforehand is read as it is by scaled_dot_product_attention alone.
    """
    layers = getattr(cache, "layers", [])
    attends = is_packed(model) or attention_of(model.config) == "sdpa"
    return bool(layers) and attends and all(type(layer) is DynamicLayer for layer in layers)


class StaticSteps:
    """Steps that continue a batch whose prompts were read, one token a row each."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        *,
        mask: Int[Tensor, "row time"],
        positions: Int[Tensor, "row 1"],
        room: int,
    ) -> None:
        """Takes over what reading the prompts left.

        Args:
            model: causal LM of which `can_keep_one_shape` is true.
            cache: what it returned; its layers are replaced.
            mask: 1 on real tokens of the prompts, which end together.
            positions: of the prompts' last tokens.
            room: steps that may follow.
        """
        rows, width = mask.shape
        self.model, self.cache = model, cache
        cache.layers[:] = [StaticRoom(layer, positions=room) for layer in cache.layers]
        self.visible: Bool[Tensor, "row 1 1 time"]
        self.visible = functional.pad(mask.bool(), (0, room))[:, None, None]
        self.place = torch.tensor([width], device=mask.device)
        self.positions = positions.clone()
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=mask.device)
        self.graph: Any = None
        self.captures = mask.device.type == "cuda"

    def step(self, ids: Int[Tensor, "row 1"]) -> Float[Tensor, "row vocabulary"]:
        """Returns the logits that follow one more token of each row; the next step overwrites them.

        Where the model's step cannot be captured it is run as it is, from then on.
        """
        self.ids.copy_(ids)
        if self.captures and self.graph is None:
            self._capture()
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self.logits

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps these rows only; a graph of them is captured with the next step."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        self.ids, self.graph = self.ids[rows], None

    def _forward(self) -> Float[Tensor, "row vocabulary"]:
        self.visible.index_fill_(3, self.place, True)
        self.positions.add_(1)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.visible,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.place.add_(1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _capture(self) -> None:
        """Makes a graph of a step; capturing runs nothing, and what warm-ups moved is put back."""
        moved = [self.visible, self.positions, self.place]
        moved += [layer.cumulative_length for layer in self.cache.layers]
        before = [tensor.clone() for tensor in moved]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            with _casting_anew():
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        self._forward()
                        _put_back(moved, before)
                torch.cuda.current_stream().wait_stream(stream)
                torch.clear_autocast_cache()  # of a model that Accelerate has set to cast by itself
                # Where a capture ends badly, torch leaves its stream on; the outer one is put back.
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                    self.logits = self._forward()
        except RuntimeError as error:  # a layer that asks the processor, or no memory for the graph
            reason = str(error).partition("\n")[0]
            log.info("decoding: no CUDA graph, steps are run one by one: %s", reason)
            _put_back(moved, before)
            self.captures = False
        else:
            self.graph = graph


class StaticRoom(StaticLayer):
    """What a `DynamicLayer` holds, in tensors with room for more positions.

    On a GPU they have autocast's precision, in which attention would read them anyway.
    """

    def __init__(self, layer: DynamicLayer, *, positions: int) -> None:
        super().__init__(max_cache_len=layer.get_seq_length() + positions)
        keys, dtype = layer.keys, layer.keys.dtype
        if keys.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        self.lazy_initialization(keys.to(dtype), layer.values)
        self.update(keys, layer.values)

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        """Writes new states behind the last; returns keys and values, of what is to come too."""
        return super().update(key_states.to(self.keys.dtype), value_states.to(self.values.dtype))


def _put_back(moved: list[Tensor], before: list[Tensor]) -> None:
    for tensor, value in zip(moved, before, strict=True):
        tensor.copy_(value)


def _casting_anew() -> contextlib.AbstractContextManager[None]:
    """Autocast as it is, without its cache: a graph must not read casts that are freed after it."""
    wanted = torch.is_autocast_enabled("cuda")
    return torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), enabled=wanted, cache_enabled=False
    )
