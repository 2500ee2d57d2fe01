"""The names under which an engine gets the weights of a mixture of experts."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.ppo.vllm_engines import check_nothing_stays_packed, write_weights


def test_experts_are_handed_over_as_a_saved_model_names_them(tmp_path):
    """In memory all of a layer lie in one tensor, under a name of memory alone."""
    policy = tiny_experts()
    policy.save_pretrained(tmp_path / "saved")
    write_weights(policy, tmp_path / "w", precision="fp32")
    saved, written = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "w")
    )
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in saved
    assert written.keys() == saved.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in written.items())


def test_a_server_that_would_keep_old_experts_is_refused():
    with pytest.raises(UserError, match="nor new experts; serve this model from a GPU"):
        check_nothing_stays_packed(tiny_experts())


def tiny_experts():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_moe", vocab_size=24, hidden_size=16, moe_intermediate_size=8, num_experts=4,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
