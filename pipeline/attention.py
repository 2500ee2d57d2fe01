"""Attention over rows that stand end to end in one, so that nothing is padding.

Transformers takes attention functions by name: a model set to one of `PACKED` works as before, and
where it is told the lengths of rows (`pipeline.sequences.Batch`) each row reads itself alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.last_layer import only, spare
from pipeline.sizes import filled_up

PRECISIONS = ("fp32", "mixed", "bf16")
"""Ways to attend under autocast to bfloat16: in float32 to a cache in float32, in float32 to one in
bfloat16, which is half as large, or in bfloat16."""
PACKED = {precision: f"packed_rows_{precision}" for precision in PRECISIONS}
"""Names of the attention functions, by those ways; without autocast they are the same."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Names under which configs say that layers do not read all that stands before a token."""
TOLERANCE = 1e-3
"""Largest difference, as a share of the largest state, that is put down to rounding."""


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "batch head time width"],
    key: Float[Tensor, "batch kv_head seen width"],
    value: Float[Tensor, "batch kv_head seen width"],
    attention_mask: Tensor | None,
    *,
    precision: str = "fp32",
    row_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "batch time head width"], None]:
    """Returns the causal attention of each row to itself, or without lengths what SDPA returns.

    In bfloat16 a processor's fused kernel may be the slower one: it took four times as long
    backward as float32's (16 rows of 36 to 128 tokens, eight heads of 32: 58 ms against 13, forward
    and backward). So it attends in float32 unless it is told otherwise.

    Args:
        module: the attention layer.
        query: of all rows, end to end in a batch of one; keys and values likewise.
        key: one head for each or for several of the query's.
        value: the same.
        attention_mask: not read where lengths are given.
        precision: bf16 attends in what autocast computes in, anything else in float32 at least.
        row_lengths: tokens of each row.
        dropout: probability of dropping one of the weights.
        options: of SDPA, such as scaling.
    """
    given = query.dtype
    narrow = _narrow(given, query.device.type)
    attends = narrow if precision == "bf16" else _at_least_float32(given)
    query, key, value = (part.to(attends) for part in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        if row_lengths is None:
            attended, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, **options
            )
            return attended.to(given), None
        groups = query.shape[1] // key.shape[1]
        parts = (
            part.split(list(row_lengths), dim=2)
            for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))
        )
        scale = options.get("scaling")
        rows = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
            for q, k, v in zip(*parts, strict=True)
        ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous().to(given), None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _narrow(dtype: torch.dtype, device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


for _precision, _name in PACKED.items():
    AttentionInterface.register(_name, partial(packed_attention, precision=_precision))
    AttentionMaskInterface.register(_name, sdpa_mask)


def leave_uncompiled() -> None:
    """Keeps torch.compile out of these functions: it would compile every set of lengths anew."""
    for precision, name in PACKED.items():
        function = partial(packed_attention, precision=precision)
        AttentionInterface.register(name, torch.compiler.disable(function))


def packed_inputs(
    input_ids: Int[Tensor, "1 time"],
    position_ids: Int[Tensor, "1 time"],
    row_lengths: Sequence[int],
) -> dict[str, Any]:
    """Returns what a model set to one of `PACKED` is given to read rows that stand end to end.

    The mask of four axes keeps Transformers from making one of its own. Where sizes are rounded, a
    row of zeros comes last, and so do states that mean nothing.
    """
    ids, positions = filled_up(input_ids[0])[None], filled_up(position_ids[0])[None]
    filler = ids.shape[1] - input_ids.shape[1]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "row_lengths": (*row_lengths, filler) if filler else tuple(row_lengths),
    }


def pack(model: PreTrainedModel, *, precision: str = "fp32") -> bool:
    """Returns whether a model reads rows end to end, once it is set to do so if it can.

    It can where its layers take their attention by name, read all that stands before a token and
    nothing else, and on trial read two rows so as they read each alone. Then its last layer is set
    to read only what is wanted of it too, if that passes the same trial. On other devices than
    processors rows stay apart: there kernels of their own do this.

    Args:
        model: causal LM or classifier.
        precision: one of PRECISIONS, how it attends under autocast to bfloat16.
    """
    if model.device.type != "cpu" or not may_pack(model):
        return is_packed(model)
    before = attention_of(model.config)
    model.set_attn_implementation(PACKED[precision])
    if is_packed(model) and _reads_rows_apart(model):
        hooks = spare(model.base_model)
        if hooks and not _reads_rows_apart(model, places=(2, 3, 8, 11)):
            for hook in hooks:
                hook.remove()
        return True
    model.set_attn_implementation(before)
    return False


def may_pack(model: PreTrainedModel) -> bool:
    """Returns whether a model's layers read all before a token, by an attention chosen by name."""
    windows = [getattr(model.config, name, None) for name in WINDOWS]
    return (
        attention_of(model.config) == "sdpa" and not any(windows) and model.is_backend_compatible()
    )


def is_packed(model: Any) -> bool:
    """Returns whether `pack` has set a model, or a role that reads through one, to packed rows."""
    return attention_of(model.config) in PACKED.values()


def kept_in(attention: str, states: Tensor) -> torch.dtype:
    """Returns in what a cache keeps keys or values, so that it need not convert all at every token.

    Rotated keys are float32 under autocast where a model's states are, values bfloat16.

    Args:
        attention: name of what reads them, as `attention_of` says.
        states: keys or values as the layers make them.
    """
    if attention == PACKED["fp32"]:
        return _at_least_float32(states.dtype)
    packed = attention in PACKED.values()
    return _narrow(states.dtype, states.device.type) if packed else states.dtype


def attention_of(config: PreTrainedConfig) -> str:
    """Returns the name of the attention that a model of this config uses."""
    return str(config._attn_implementation)  # noqa: SLF001 - transformers has no other name for it


@torch.no_grad()
def _reads_rows_apart(model: PreTrainedModel, *, places: Sequence[int] = range(12)) -> bool:
    ids = torch.arange(12)[None] % model.config.vocab_size
    lengths = (5, 7)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = packed_inputs(ids, positions, lengths)
    with only(torch.tensor(places), length=12):
        together = model.base_model(**inputs, use_cache=False).last_hidden_state
    alone = torch.cat(
        [
            model.base_model(input_ids=row, use_cache=False).last_hidden_state
            for row in ids.split(lengths, dim=1)
        ],
        dim=1,
    )
    wrong = (together - alone)[:, list(places)]
    return bool(wrong.abs().max() <= TOLERANCE * alone.abs().max())
