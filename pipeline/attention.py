"""Attention over rows that stand end to end in one, so that nothing is padding.

Transformers takes attention functions by name: a model that is set to `PACKED` works as before, and
where it is told the lengths of rows (`pipeline.sequences.Batch`) each row reads itself alone.
"""

from collections.abc import Sequence
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

PACKED = "packed_rows"
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
    row_lengths: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "batch time head width"], None]:
    """Returns the causal attention of each row to itself, or without lengths what SDPA returns.

    Args:
        module: the attention layer.
        query: of all rows, end to end in a batch of one; keys and values likewise.
        key: one head for each or for several of the query's.
        value: the same.
        attention_mask: not read where lengths are given.
        row_lengths: tokens of each row.
        scaling: what products of queries and keys are multiplied by.
        dropout: probability of dropping one of the weights.
        options: of SDPA.
    """
    if row_lengths is None:
        with torch.autocast(query.device.type, enabled=False):
            parts = (_steady(part) for part in (query, key, value))
            attended, _ = sdpa_attention_forward(
                module, *parts, attention_mask, dropout=dropout, scaling=scaling, **options
            )
        return attended.to(query.dtype), None
    groups = query.shape[1] // key.shape[1]
    parts = (
        _steady(part).split(list(row_lengths), dim=2)
        for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    with torch.autocast(query.device.type, enabled=False):
        rows = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
            for q, k, v in zip(*parts, strict=True)
        ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous().to(query.dtype), None


def _steady(part: Tensor) -> Tensor:
    """Returns queries, keys or values in the precision in which attention is fast: never bfloat16.

    A processor's fused kernel takes four times as long backward in bfloat16 as in float32 (16 rows
    of 36 to 128 tokens, eight heads of 32: 58 ms against 13, forward and backward), and so does a
    step of decoding (16 rows after 80 tokens: 0.55 ms against 0.13).
    """
    return part.float() if part.dtype == torch.bfloat16 else part


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def packed_inputs(
    input_ids: Int[Tensor, "1 time"],
    position_ids: Int[Tensor, "1 time"],
    row_lengths: Sequence[int],
) -> dict[str, Any]:
    """Returns what a model set to `PACKED` is given to read rows that stand end to end.

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


def pack(model: PreTrainedModel) -> bool:
    """Returns whether a model reads rows end to end, once it is set to do so if it can.

    It can where its layers take their attention by name, read all that stands before a token and
    nothing else, and on trial read two rows so as they read each alone. Then its last layer is set
    to read only what is wanted of it too, if that passes the same trial. On other devices than
    processors rows stay apart: there kernels of their own do this.
    """
    if model.device.type != "cpu" or not may_pack(model):
        return is_packed(model)
    before = attention_of(model.config)
    model.set_attn_implementation(PACKED)
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
    return attention_of(model.config) == PACKED


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
