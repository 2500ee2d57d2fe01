"""Divided models against whole ones, in two real processes: what `tests.divided_checks` found."""

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from pipeline import sharding
from pipeline.errors import UserError
from pipeline.sharding import (
    Sharded,
    in_one_pass,
    layers_of,
    outline_of,
    recompute,
    save_role,
    whole,
)
from tests.support import tiny_llama
from tests.together import names, outcomes

CHECKS = "tests.divided_checks"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(CHECKS, tmp_path_factory.mktemp("divided"))


@pytest.mark.parametrize("name", names(CHECKS))
def test_of_two_processes(found, name):
    assert found[name] == ["", ""], "\n".join(found[name])


def test_weights_and_moments_stay_with_the_processor_where_they_are_offloaded(monkeypatch):
    asked = []

    def record(part, **options):
        asked.append((type(part).__name__, options))
        part.set_gradient_divide_factor = part.set_force_sum_reduction_for_comms = float

    monkeypatch.setattr(sharding, "fully_shard", record)
    monkeypatch.setattr(sharding, "_mesh", str)
    Sharded(tiny_llama(), device=torch.device("cuda"), precision="bf16", offload=True)
    assert [name for name, _ in asked] == [*["LlamaDecoderLayer"] * 2, "LlamaForCausalLM"]
    for _, options in asked:
        assert (options["mesh"], options["reshard_after_forward"]) == ("cuda", True)
        assert isinstance(options["offload_policy"], CPUOffloadPolicy)
        policy = options["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_an_outline_has_the_names_and_ties_of_a_model_and_no_weights():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    outline = outline_of(model)
    assert outline.lm_head.weight is outline.model.embed_tokens.weight
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in outline.named_parameters()} == shapes
    assert all(p.is_meta for p in outline.parameters())
    assert torch.equal(outline.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert len(layers_of(outline)) == 2


def test_a_whole_model_is_read_and_written_as_it_is(tmp_path):
    model = tiny_llama()
    with whole(model) as same:
        assert same is model
    assert in_one_pass(model, lambda a, b: a + b, 1, 2) == 3
    save_role(model, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_model_without_layers_cannot_compute_them_again():
    with pytest.raises(UserError, match="activation_checkpointing: Linear has no layers that can"):
        recompute(torch.nn.Linear(2, 2))
