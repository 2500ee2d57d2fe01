"""Rows end to end in one: what a model reads of each is what it reads of it alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.attention import PRECISIONS, attention_of, is_packed, pack, packed_attention
from pipeline.sequences import collate, response_states, response_tokens, token_logprobs
from tests.support import assert_close, tiny_llama

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
INNER = {"intermediate_size": 48}
GROUPS = {**INNER, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
PACKING = {
    "llama": GROUPS,
    "qwen2": GROUPS,
    "mistral": {**GROUPS, "sliding_window": None},
    "gpt_neox": INNER,
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
NOT_PACKING = {
    "mistral": {**GROUPS, "sliding_window": 8},
    "falcon": {"alibi": True},
    "qwen3_next": {**GROUPS, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[13, 1], [14, 15, 16, 17, 1], [18, 19]]


def built(kind: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **TOKENS, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def gradients_of(model, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(PROMPTS, RESPONSES, pad_id=0, packed=packed)
    logprobs = token_logprobs(model, response_states(model, batch), response_tokens(batch))
    model.zero_grad()
    (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logprobs.detach(), torch.cat(found)


@pytest.mark.parametrize("kind", PACKING)
def test_packed_rows_have_the_logprobs_and_gradients_of_padded_ones(kind):
    model = built(kind, PACKING[kind]).double()
    padded = gradients_of(model, packed=False)
    assert pack(model)
    assert is_packed(model)
    packed = gradients_of(model, packed=True)
    assert_close(packed[0], padded[0], tolerance=1e-12)
    assert_close(packed[1], padded[1], tolerance=1e-10)
    still = gradients_of(model, packed=False)  # padded rows, masks and all, are read as before
    assert_close(still[0], padded[0], tolerance=1e-12)


@pytest.mark.parametrize("kind", NOT_PACKING)
def test_a_model_that_reads_otherwise_is_left_as_it_was(kind):
    model = built(kind, NOT_PACKING[kind])
    assert not pack(model)
    assert attention_of(model.config) == "sdpa"


def test_bfloat16_is_attended_to_in_float32():
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3)]
    found, exact = (
        packed_attention(torch.nn.Identity(), *which, None, row_lengths=(4, 5))[0]
        for which in (parts, [part.float() for part in parts])
    )
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        wide = [part.float() for part in parts]
        under, _ = packed_attention(torch.nn.Identity(), *wide, None, row_lengths=(4, 5))
        parts = [part.bfloat16() for part in wide]
        padded, _ = packed_attention(torch.nn.Identity(), *parts, None, is_causal=True)
        whole, _ = packed_attention(torch.nn.Identity(), *wide, None, row_lengths=(9,))
    assert padded.dtype == torch.bfloat16
    assert torch.equal(under, exact)
    assert torch.equal(padded, whole.bfloat16())


def test_bfloat16_is_attended_to_as_it_is_where_told_so():
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3)]
    found, _ = packed_attention(
        torch.nn.Identity(), *parts, None, precision="bf16", row_lengths=(9,)
    )
    plain = scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)
    assert torch.equal(found, plain)
    wide, _ = packed_attention(torch.nn.Identity(), *parts, None, row_lengths=(9,))
    assert not torch.equal(found, wide)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_autocast_all_ways_to_attend_are_one(precision):
    batch = collate(PROMPTS, RESPONSES, pad_id=0, packed=True)
    models = [tiny_llama(), tiny_llama()]
    assert pack(models[0])
    assert pack(models[1], precision=precision)
    first, other = (response_states(model, batch) for model in models)
    assert torch.equal(first, other)


def test_packed_batches_by_hand():
    batch = collate([[5, 6], [7]], [[8], [9, 1]], pad_id=0, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 8, 7, 9, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.response_mask.long().tolist() == [[0, 0, 1, 0, 1, 1]]
    assert batch.row_lengths == (3, 3)
    assert [ends.tolist() for ends in batch.last()] == [[0, 0], [2, 5]]


def test_packing_leaves_no_trace_on_disk(tmp_path):
    model = tiny_llama()
    assert pack(model)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert attention_of(again.config) == "sdpa"
