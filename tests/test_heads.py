"""Logits of models that do more with their last hidden states than multiply by a matrix."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.evaluation.likelihood import Batching, divergence, negative_log_likelihood
from pipeline.heads import logits_head, reshapes_logits
from pipeline.language_loss import plain_head
from pipeline.sequences import next_logits
from tests.support import assert_close, tiny_llama

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "hyperclovax": {"logits_scaling": 0.5},
    "gemma3_text": {"final_logit_softcapping": 1.0},
}


def of_family(name: str, *, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **SIZES, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config).eval().double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_the_models_own_forward_pass(name):
    model = of_family(name)
    ids = torch.randint(2, 24, (1, 9))
    assert reshapes_logits(model.config)
    expected = model(input_ids=ids).logits[0]
    states = model.base_model(input_ids=ids).last_hidden_state[0]
    found = next_logits(model, states, temperature=0.7)
    assert_close(found, expected / 0.7, tolerance=1e-10)
    assert float((model.get_output_embeddings()(states) - expected).detach().abs().max()) > 0.1
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((logits.log_softmax(-1)[:, 3]).sum(), parameters, allow_unused=True)
        for logits in (0.7 * found, expected)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            assert_close(our, their, tolerance=1e-10)


def test_a_forward_pass_that_was_replaced_on_the_model_is_not_asked():
    model = of_family("granite")  # as accelerate and TRL replace it
    ids = torch.randint(2, 24, (1, 9))
    expected = model(input_ids=ids).logits[0]
    model.forward = model.forward
    states = model.base_model(input_ids=ids).last_hidden_state[0]
    assert_close(next_logits(model, states), expected, tolerance=1e-10)


def test_a_plain_head_is_called_as_it_is():
    model = tiny_llama()
    assert not reshapes_logits(model.config)
    assert logits_head(model) is model.get_output_embeddings()


@pytest.mark.parametrize("field", ["logits_soft_cap", "output_logit_soft_cap"])
def test_a_model_that_caps_its_logits_keeps_its_own_loss(field):
    model = tiny_llama()
    setattr(model.config, field, 30.0)
    assert not plain_head(model)


def test_an_evaluation_reads_what_such_a_model_samples_from():
    # KL and likelihood of a reply, a row at a time, from the logits of whole forward passes.
    ours, theirs = of_family("granite").float(), of_family("granite", seed=1).float()
    prompt, reply = [5, 6, 7], [8, 9, 1]
    rows = {"prompts": [prompt], "responses": [reply]}
    batching = Batching(pad_id=0, batch_size=2)
    with torch.no_grad():
        ids = torch.tensor([prompt + reply])
        p, q = (m(input_ids=ids).logits[0, 2:5].log_softmax(-1) for m in (ours, theirs))
    nll = negative_log_likelihood(ours, **rows, batching=batching)
    apart = divergence(ours, reference=theirs, **rows, batching=batching)
    assert_close(nll[0], -p[range(3), reply].sum(), tolerance=1e-5)
    assert_close(apart.kl[0], (p.exp() * (p - q)).sum(), tolerance=1e-5)
    assert_close(apart.k1[0], (p - q)[range(3), reply].sum(), tolerance=1e-5)
