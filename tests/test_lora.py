"""LoRA's settings: what they become for peft and transformers, and what is refused."""

import importlib.util

import pytest
import torch

from pipeline.errors import UserError
from pipeline.lora import LoRA, merged, quantisation, with_adapter, write_adapter
from pipeline.models import load_causal_lm
from tests.support import assert_close, tiny_llama

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def adapted(lora: LoRA, *, spread: float = 0.0):
    """A tiny model wrapped with adapters; B is drawn where there is a spread."""
    model = tiny_llama()
    wrapped = with_adapter(model, lora, task="CAUSAL_LM", seed=3)
    for name, parameter in wrapped.named_parameters():
        if spread and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return wrapped


def test_rank_0_leaves_the_model_as_it_is():
    model = tiny_llama()
    assert with_adapter(model, LoRA(), task="CAUSAL_LM", seed=0) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_new_adapters_change_nothing_and_follow_the_seed():
    first, second = adapted(LoRA(rank=4)), adapted(LoRA(rank=4))
    assert_close(first(IDS).logits, tiny_llama()(IDS).logits)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapter_by_hand(tmp_path):
    wrapped = adapted(LoRA(rank=4, alpha=12, targets=("q_proj",)), spread=0.3)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 4  # A and B of q_proj in two layers
    weights = {name.replace(".default", ""): p for name, p in trained.items()}
    write_adapter(tmp_path, wrapped.peft_config["default"], weights, base=tmp_path / "sft")
    base, result = tiny_llama(), merged(tiny_llama(), tmp_path)
    for number in (0, 1):
        a, b = (
            weights[f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_{x}.weight"]
            for x in "AB"
        )
        before = base.model.layers[number].self_attn.q_proj.weight
        after = result.model.layers[number].self_attn.q_proj.weight
        assert_close(after.detach(), (before + 12 / 4 * b @ a).detach())
    assert torch.equal(
        base.model.layers[0].mlp.up_proj.weight, result.model.layers[0].mlp.up_proj.weight
    )


def test_four_bits_need_bitsandbytes(monkeypatch):
    assert quantisation("none") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="lora.quantise: 4bit needs bitsandbytes, .* set it to none"
    ):
        quantisation("4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here")
    config = quantisation("4bit")
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert set(config.llm_int8_skip_modules) == {"lm_head", "score"}


def test_four_bits_train_an_adapter_on_a_frozen_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    tiny_llama(hidden=64).save_pretrained(tmp_path)
    lora = LoRA(rank=4, quantise="4bit")
    base = load_causal_lm(tmp_path, quantisation=quantisation(lora.quantise))
    packed = base.model.layers[0].self_attn.q_proj.weight
    before = packed.clone()
    assert packed.dtype == torch.uint8
    with torch.no_grad():
        logits = tiny_llama(hidden=64)(IDS).logits
        assert 0 < (base(IDS).logits - logits).abs().max() < 0.5 * logits.std()
    wrapped = with_adapter(base, lora, task="CAUSAL_LM", seed=3)
    wrapped.eval()  # as ppo trains, which has read the same layers without gradient before
    wrapped(IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    assert torch.equal(packed, before)


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(
        UserError, match=r"lora.targets: llama has no linear layer named \['w_proj'\]"
    ):
        adapted(LoRA(rank=4, targets=("q_proj", "w_proj")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank: must be at least 0, got -1"),
        ({"alpha": 0}, "lora.alpha: must be at least 1, got 0"),
        ({"dropout": 1.0}, r"lora.dropout: must be in \[0, 1\), got 1.0"),
        ({"rank": 4, "quantise": "8bit"}, "lora.quantise: must be none or 4bit, got '8bit'"),
        ({"quantise": "4bit"}, "lora.quantise: a base in 4bit cannot be trained itself"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings)
