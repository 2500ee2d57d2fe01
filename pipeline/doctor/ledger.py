"""What a piece of work holds and how long it takes, counted on tensors without contents.

The stages' own code runs on torch's fake tensors, and every operation passes by here. Where it asks
for contents it is told of none: an unknown number is 0, an unknown mask picks no rows.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.doctor.machine import Rates

Item = TypeVar("Item")

aten = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001 - torch's names
FUSED_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default  # noqa: SLF001
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
MOST_NUMBERS = 2**24
"""Numbers that an operation makes with contents at most."""
BACKWARD_SHARE = 2.5
"""Products of fused attention's backward pass by those of its forward pass: five for two."""


class Light(TorchDispatchMode):
    """Runs operations for real, but those that would make much memory on tensors without contents.

    Masks of attention grow with the square of a row's length; nobody asks for their contents.
    """

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation."""
        with made_up() if _size(func, args) > MOST_NUMBERS else nullcontext():
            return func(*args, **(kwargs or {}))


class Ledger(Light):
    """Counts the bytes of all storages that are alive, the most at a time, and the seconds.

    An operation takes as long as its products at the machine's rate, or as its tensors to be read
    and written, whichever is longer (the roofline; Williams et al. 2009), and some to be called.

    Attributes:
        live: bytes that are alive.
        peak: the most that were, since `restart`.
        flops: floating-point operations of matrix products and attention, since then.
        seconds: that all operations take, since then.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.live, self.peak, self.flops, self.seconds = 0, 0, 0, 0.0
        self._known: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._enter(tensor)

    def restart(self) -> None:
        """Forgets the peak, the operations and the seconds so far."""
        self.peak, self.flops, self.seconds = self.live, 0, 0.0

    def once_for_all(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the first of items that are worked on alike; what it takes counts for each."""
        first, *others = items
        flops, seconds = self.flops, self.seconds
        yield first
        self.flops += len(others) * (self.flops - flops)
        self.seconds += len(others) * (self.seconds - seconds)

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation, for real where no tensor is fake, and notes what it made."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):  # noqa: SLF001
            return 0.0 if args[0].dtype.is_floating_point else 0
        if func in INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        result = super().__torch_dispatch__(func, _types, args, kwargs)
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for tensor in made:
            self._enter(tensor)
        if not func.is_view:
            self._time(func, args, kwargs, made)
        return result

    def _time(self, func: Any, args: Sequence[Any], kwargs: Any, made: Sequence[Tensor]) -> None:
        read = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
        flops = _flops(func, args, kwargs, made)
        low = bool(read) and read[0].dtype == torch.bfloat16
        products = flops / (self.rates.bf16_flops if low else self.rates.fp32_flops)
        self.flops += flops
        self.seconds += max(products, moved / self.rates.bandwidth) + self.rates.call_seconds

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _size(func: Any, args: Sequence[Any]) -> int:
    """Returns how many numbers an operation on tensors with contents makes, about."""
    tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
    if func.is_view or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return 0
    if not tensors:  # made from sizes
        sizes = args[0] if args and isinstance(args[0], Sequence) else args[:1]
        return math.prod(size for size in sizes if isinstance(size, int))
    joined = sum(tensor.numel() for tensor in tensors)
    try:
        return max(joined, math.prod(torch.broadcast_shapes(*(one.shape for one in tensors))))
    except RuntimeError:  # no operation of number by number
        return joined


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the indices with masks as the places where they are True."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif isinstance(index, FakeTensor):
            found += [torch.zeros(0, dtype=torch.long)] * index.ndim
        else:
            found += index.nonzero().unbind(dim=1)
    return found


def _flops(func: Any, args: Sequence[Any], kwargs: Any, made: Sequence[Tensor]) -> int:
    if func in (FUSED, FUSED_BACKWARD):
        query, key = args[:2] if func is FUSED else args[1:3]
        once = 4 * math.prod(query.shape) * key.shape[-2]
        return once if func is FUSED else int(BACKWARD_SHARE * once)
    formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=made[0]) if formula else 0


@contextmanager
def made_up() -> Iterator[None]:
    """Makes every tensor that is made within a fake one; they go on being so outside."""
    with _one_mode():
        yield


@functools.cache
def _one_mode() -> FakeTensorMode:
    """Returns the mode of all fake tensors: roles that share weights must share it too."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def hollow(model: nn.Module) -> nn.Module:
    """Returns a model of the meta device with fake tensors in place of its own; tied ones stay so.

    Fake ones know a device, so autocast and attention choose as they will in earnest. The model is
    not built of them, for peft moves what it adds, and torch cannot move a fake parameter.
    """
    found: dict[int, Tensor] = {}

    def likeness(tensor: Tensor) -> Tensor:
        if id(tensor) not in found:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            found[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
            )
        return found[id(tensor)]

    with made_up():
        for module in model.modules():
            own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for name, tensor in [pair for pairs in own for pair in pairs]:
                setattr(module, name, likeness(tensor))
    return model
