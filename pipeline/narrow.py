"""Weights in bfloat16 while a model decodes: one copy for all steps and threads.

Autocast would cast frozen weights, as below adapters, at every step, and keep a copy of trained
ones in each thread. In a CUDA graph it would cast all of them at every replay, and move four times
the memory that a step needs.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def narrow_type(device: torch.device) -> torch.dtype | None:
    """Returns in what autocast computes products now; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def only_in_products(model: nn.Module) -> set[int]:
    """Returns the ids of weights that linear layers read and nothing else: no tied embedding."""
    read, elsewhere = set[int](), set[int]()
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            product = isinstance(part, nn.Linear) and name == "weight"
            (read if product else elsewhere).add(id(weight))
    return read - elsewhere


@contextlib.contextmanager
def narrowed(model: Any) -> Iterator[None]:
    """Lets linear layers hold what autocast to bfloat16 makes of their weights.

    So products are the same to the last bit. Weights that a layer shares with the embedding stay
    whole there. Without autocast nothing changes.
    """
    narrow = narrow_type(model.device)
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)] if narrow else []
    whole = [(layer, layer.weight) for layer in layers if layer.weight.dtype == torch.float32]
    for layer, weight in whole:
        layer.weight = nn.Parameter(weight.detach().to(narrow), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in whole:
            layer.weight = weight
