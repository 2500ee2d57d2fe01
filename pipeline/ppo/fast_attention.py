"""Which attention is the fastest on this processor under autocast to bfloat16, by measurement."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

from pipeline.attention import PACKED, PRECISIONS, packed_attention
from pipeline.config import StageConfig
from pipeline.parallel import choose_workers
from pipeline.points import Points
from pipeline.ppo.cache import make_room
from pipeline.pretrained import from_pretrained

C = TypeVar("C", bound=StageConfig)

TOKENS = 4096
MOST_ROWS = 32
"""Tokens that are read, of at most so many rows."""
MOST_LAYERS = 8
"""Layers that decode, at most: what they keep then fills a processor's caches as it will."""
STEPS = 4
"""Tokens that are decoded for the measurement, after half of a response."""
TURNS = 3
AUTOCAST = torch.autocast("cpu", torch.bfloat16)
CLEARLY = 0.85
"""Share of the first one's time within which another must stay to be chosen: less is noise."""


def with_fast_attention(config: C, points: Points, *, sft: Path) -> C:
    """Returns the configuration of ppo with the attention that is fastest for the policy here.

    Args:
        config: of the stage.
        points: of its run, which know what was chosen when it began.
        sft: folder of the model that the policy starts from.
    """
    told: Any = config
    workers = choose_workers(told.workers, torch.device("cpu"))

    def measured() -> str:
        return fastest_attention(
            from_pretrained(AutoConfig, sft, weights=False),
            prompt=told.max_prompt_tokens,
            response=told.max_response_tokens,
            passes=told.optimisation.epochs,
            threads=max(1, torch.get_num_threads() // workers),
        )

    chosen: C = replace(told, attention=points.choose("attention", told.attention, measured))
    return chosen


def fastest_attention(config: Any, *, prompt: int, response: int, passes: int, threads: int) -> str:
    """Returns one of PRECISIONS, the first unless another is clearly faster.

    Each reads the rows of a few responses forward and backward, and decodes them, in layers of
    random numbers, in turn; of the turns the fastest counts. A model without attention heads gets
    the first.

    Args:
        config: Transformers' configuration of the policy.
        prompt: most tokens of a prompt.
        response: most tokens of a response.
        passes: forward and backward over each row for one time that it is decoded.
        threads: of a pass.
    """
    if not isinstance(getattr(config.get_text_config(), "num_attention_heads", None), int):
        return PRECISIONS[0]
    layers = _Layers(config)
    length = prompt + max(1, response // 2)
    rows = max(1, min(MOST_ROWS, TOKENS // length))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    read = _seconds(layers.reading(rows, length), ("fp32", "bf16"))
    decoded = _seconds(layers.decoding(rows, length), PRECISIONS)
    torch.set_num_threads(before)
    read["mixed"] = read["fp32"]
    steps = response / STEPS
    total = {
        name: passes * layers.count * read[name] + steps * decoded[name] for name in PRECISIONS
    }
    first, fastest = PRECISIONS[0], min(total, key=lambda name: total[name])
    return fastest if total[fastest] < CLEARLY * total[first] else first


def _seconds(work: Callable[[str], None], names: Sequence[str]) -> dict[str, float]:
    """Returns what work takes at best by each of its ways, in turn."""
    taken = dict.fromkeys(names, math.inf)
    for turn, name in product(range(TURNS + 1), names):
        start = time.perf_counter()
        with AUTOCAST:
            work(name)
        seconds = time.perf_counter() - start
        if turn > 0:  # the first one warms up
            taken[name] = min(taken[name], seconds)
    return taken


class _Layers(nn.Module):
    """What the layers of a model hand to its attention, in random numbers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text = config.get_text_config()
        self.count = min(MOST_LAYERS, text.num_hidden_layers)
        self.heads = text.num_attention_heads
        self.kv_heads = getattr(text, "num_key_value_heads", None) or self.heads
        self.width = getattr(text, "head_dim", None) or text.hidden_size // self.heads
        self.num_key_value_groups = self.heads // self.kv_heads

    def states(self, rows: int, length: int, *, trained: bool = False) -> tuple[torch.Tensor, ...]:
        """Returns queries and keys in float32, as rotation leaves them, and values in bfloat16."""
        kinds = (self.heads, torch.float32), (self.kv_heads, torch.float32)
        own = torch.Generator().manual_seed(0)  # what others draw stays as it was
        sizes = (length, self.width)
        return tuple(
            torch.randn(rows, heads, *sizes, dtype=dtype, generator=own).requires_grad_(trained)
            for heads, dtype in (*kinds, (self.kv_heads, torch.bfloat16))
        )

    def reading(self, rows: int, length: int) -> Callable[[str], None]:
        """Returns what reads rows end to end, forward and backward."""
        query, key, value = self.states(1, rows * length, trained=True)

        def work(precision: str) -> None:
            with torch.enable_grad():
                found, _ = packed_attention(
                    self, query, key, value, None, precision=precision, row_lengths=rows * [length]
                )
                torch.autograd.grad(found, (query, key, value), found.detach())

        return work

    def decoding(self, rows: int, length: int) -> Callable[[str], None]:
        """Returns what decodes some more tokens of every row."""
        _, *read = self.states(rows, length)
        query, *new = self.states(rows, 1)
        caches = {precision: DynamicCache() for precision in PRECISIONS}
        for precision, cache in caches.items():
            for index in range(self.count):
                cache.update(*read, index)
            with AUTOCAST:
                make_room(cache, positions=STEPS * (TURNS + 1), attention=PACKED[precision])

        @torch.no_grad()
        def work(precision: str) -> None:
            for _, index in product(range(STEPS), range(self.count)):
                keys, values = caches[precision].update(*new, index)
                mask = torch.ones(rows, 1, 1, keys.shape[2], dtype=torch.bool)
                packed_attention(self, query, keys, values, mask, precision=precision)

        return work
