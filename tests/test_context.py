"""How much a model reads: its positions where it has them, else without bound."""

import pytest
import torch
from transformers import AutoConfig

from pipeline.architecture import Architecture
from pipeline.checkpoint import foreign_artifact
from pipeline.context import context_of, fits
from pipeline.errors import UserError
from pipeline.lora import LoRA
from pipeline.ppo.loading import load_roles
from pipeline.ppo.wanted import Wanted
from stages import pretrain
from tests.evaluation.fakes import tiny_tokenizer

UNBOUNDED = Architecture(
    model_type="recurrent_gemma",
    options={
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "lru_width": 16,
        "num_attention_heads": 2,
    },
)  # fmt: skip


def test_the_context_is_the_number_of_positions():
    llama = AutoConfig.for_model("llama", max_position_embeddings=64)
    assert context_of(llama) == 64
    assert (fits(llama, 64), fits(llama, 65)) == (True, False)
    gpt2 = AutoConfig.for_model("gpt2", n_positions=32)
    assert context_of(gpt2) == 32


def test_a_model_of_several_parts_reads_what_its_text_part_reads():
    whole = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 128})
    assert context_of(whole) == 128


def test_models_without_positions_have_no_bound():
    for model_type in ("bloom", "recurrent_gemma"):
        config = AutoConfig.for_model(model_type)
        assert context_of(config) is None
        assert fits(config, 10**9)


def test_a_model_without_bound_is_built_and_becomes_ppos_roles(tmp_path):
    tokenizer = tiny_tokenizer()
    model = pretrain.build_model(pretrain.Config(architecture=UNBOUNDED), tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanted = Wanted(
        roles="separate", lora=LoRA(), seed=1, critic=False, normalise=True, longest=10**9
    )
    sft = foreign_artifact(tmp_path, kind="causal-lm")
    roles = load_roles(sft, None, wanted=wanted, device=torch.device("cpu"))
    assert roles.policy.config.model_type == "recurrent_gemma"


def test_a_model_that_cannot_be_built_is_refused_for_its_own_reason():
    told = (
        r"architecture: no xlnet could be made \(NotImplementedError: .* no sequence length limit"
    )
    with pytest.raises(UserError, match=told):
        xlnet = Architecture(model_type="xlnet")
        pretrain.build_model(pretrain.Config(architecture=xlnet), tiny_tokenizer())
