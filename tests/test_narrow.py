"""Weights in bfloat16 while a model decodes: the same tokens, and nothing left behind."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline.lora import quiet_about_old_names
from pipeline.narrow import narrowed
from pipeline.ppo import rollout
from pipeline.ppo.rollout import generate, uniforms
from tests.support import tiny_llama

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


def sampled(model, monkeypatch, *, plain, workers=1):
    numbers = uniforms(3, update=0, rows=range(4), positions=20)
    with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        if plain:
            patch.setattr(rollout, "narrowed", lambda _: torch.no_grad())
        return generate(
            model, PROMPTS, uniforms=numbers, eos_id=1, pad_id=0, workers=workers, batch_size=2
        )


def plain_model():
    return tiny_llama()


def tied_model():
    model = tiny_llama()
    model.lm_head.weight = model.base_model.embed_tokens.weight
    return model


def adapted_model():
    model = tiny_llama()
    modules = ["q_proj", "down_proj"]
    with quiet_about_old_names():
        get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize("build", [plain_model, tied_model, adapted_model])
@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_and_their_figures_are_those_of_autocast_alone(monkeypatch, build, workers):
    model = build()
    before = dict(model.named_parameters())
    plain = sampled(model, monkeypatch, plain=True)
    narrow = sampled(model, monkeypatch, plain=False, workers=workers)
    assert narrow.responses == plain.responses
    assert len({token for response in plain.responses for token in response}) > 5
    for name, rows in plain.figures.items():
        assert all(map(torch.equal, narrow.figures[name], rows))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is weight for name, weight in before.items())


def test_weights_are_narrow_inside_and_whole_after_a_failure():
    model = tiny_llama()
    head = model.lm_head.weight
    autocast = torch.autocast("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="stop"), autocast, narrowed(model):
        assert torch.equal(model.lm_head.weight, head.bfloat16())
        assert model.base_model.norm.weight.dtype == torch.float32
        assert model.base_model.embed_tokens.weight.dtype == torch.float32
        raise ValueError("stop")
    assert model.lm_head.weight is head
    with narrowed(model):  # no autocast here
        assert model.lm_head.weight is head


def test_weights_are_narrow_on_a_gpu_too(monkeypatch):
    layer = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": torch.float16}.__getitem__)
    there = SimpleNamespace(device=torch.device("cuda"), modules=lambda: [layer])
    with narrowed(there):
        assert layer.weight.dtype == torch.float16
    assert layer.weight.dtype == torch.float32
