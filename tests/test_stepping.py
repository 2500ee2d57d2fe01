"""Causal models without a standard cache: the same tokens and log-probabilities as row by row."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.ppo.rollout import generate, uniforms
from pipeline.sequences import collate, response_states, response_tokens, token_logprobs
from pipeline.stepping import steps_by_cache
from tests.support import assert_close, tiny_llama

SIZES = {
    "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
OTHERS = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 4},
    "recurrent_gemma": {
        "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 64,
        "lru_width": 32,
    },
    "rwkv": {"attention_hidden_size": 32},
    "openai-gpt": {"n_embd": 32, "n_head": 2, "n_layer": 2},
}  # fmt: skip
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13], [14, 15, 16]]
BUDGET = 12


def made(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **OTHERS[kind]})
    return AutoModelForCausalLM.from_config(config).eval()


def row_by_row(model, numbers, *, eos: int) -> list[list[int]]:
    """Each response alone, from the whole row at every token."""
    found = []
    for prompt, row in zip(PROMPTS, numbers, strict=True):
        response: list[int] = []
        for number in row:
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *response]])
                logits = model(input_ids=ids, use_cache=False).logits[0, -1].double()
            shares = logits.softmax(dim=0).cumsum(dim=0)
            response.append(int((shares <= number * shares[-1]).sum()))
            if response[-1] == eos:
                break
        found.append(response)
    return found


@pytest.mark.parametrize("kind", OTHERS)
def test_the_tokens_and_logprobs_of_each_row_alone(kind):
    model = made(kind)
    assert not steps_by_cache(model)
    numbers = uniforms(3, update=0, rows=range(len(PROMPTS)), positions=BUDGET)
    eos = row_by_row(model, numbers, eos=-1)[0][2]  # ends the first one after three tokens
    sampled = generate(model, PROMPTS, uniforms=numbers, eos_id=eos, pad_id=0, workers=2)
    assert sampled.responses == row_by_row(model, numbers, eos=eos)
    assert len({len(response) for response in sampled.responses}) > 1
    batch = collate(PROMPTS, sampled.responses, pad_id=0)
    with torch.no_grad():
        measured = token_logprobs(model, response_states(model, batch), response_tokens(batch))
    assert_close(torch.cat(sampled.figures["logprobs"]), measured, tolerance=1e-4)


def test_a_model_with_a_standard_cache_goes_on_from_it():
    assert steps_by_cache(tiny_llama())
