"""Models whose class knows plain attention alone, and those that cannot continue a text."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.architecture import Architecture
from pipeline.attention import attention_of, pack
from pipeline.errors import UserError
from pipeline.models import build_causal_lm, load_causal_lm
from pipeline.ppo.rollout import generate
from pipeline.sequences import collate, response_states, response_tokens, token_logprobs
from tests.evaluation.fakes import tiny_tokenizer
from tests.reward.encoders import save_encoder
from tests.support import assert_close, tiny_llama

SMALL = {
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gemma2": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "attn_logit_softcapping": 2.0,
    },
}  # fmt: skip
ENCODERS = ("bert", "roberta", "bert-generation", "electra", "roformer")
PROMPTS = [[5, 6, 7, 9], [8], [4, 4]]
EOS = 1


def small(model_type: str):
    """A random model whose tokens differ."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 24, "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 2}
    config = AutoConfig.for_model(model_type, **tokens, **SMALL[model_type])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def one_by_one(model, prompt, numbers):
    """The reply and its log-probabilities by whole passes over one row, without cache or mask."""
    ids, reply, logprobs = list(prompt), [], []
    for number in numbers:
        chances = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(dim=-1)
        token = int((chances.cumsum(dim=0) <= number * chances.sum()).sum())
        ids.append(token)
        reply.append(token)
        logprobs.append(float(chances[token].log()))
        if token == EOS:
            break
    return reply, logprobs


@pytest.mark.parametrize("model_type", SMALL)
def test_a_model_without_sdpa_replies_and_is_read_as_by_a_plain_loop(tmp_path, model_type):
    small(model_type).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path)
    assert attention_of(model.config) == "eager"
    assert not pack(model)
    numbers = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sampled = generate(model, PROMPTS, uniforms=numbers, eos_id=EOS, pad_id=0)
    slow = [one_by_one(model, *pair) for pair in zip(PROMPTS, numbers, strict=True)]
    assert sampled.responses == [reply for reply, _ in slow]
    expected = torch.tensor([logprob for _, logprobs in slow for logprob in logprobs])
    drawn = zip(sampled.figures["logprobs"], sampled.responses, strict=True)
    assert_close(torch.cat([row[: len(reply)] for row, reply in drawn]), expected)
    batch = collate(PROMPTS, sampled.responses, pad_id=0)
    with torch.no_grad():
        states = response_states(model, batch)
        assert_close(token_logprobs(model, states, response_tokens(batch)), expected)


@pytest.mark.parametrize(("model_type", "attention"), [("bloom", "eager"), ("gpt2", "sdpa")])
def test_random_weights_get_the_attention_that_their_class_knows(model_type, attention):
    options = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = build_causal_lm(
        Architecture(model_type=model_type, options=options),
        tokenizer=tiny_tokenizer(),
        max_length=32,
        seed=0,
    )
    assert attention_of(model.config) == attention


def test_a_config_that_names_an_attention_does_not_choose_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"attn_implementation": "flash_attention_2"}))
    assert attention_of(load_causal_lm(tmp_path).config) == "sdpa"


def test_an_encoder_is_no_model_to_start_from(tmp_path):
    save_encoder(tmp_path / "bert", max_length=64)
    with pytest.raises(UserError, match=r"/bert: bert is an encoder, .* reward.init_from takes"):
        load_causal_lm(tmp_path / "bert")


def test_random_weights_that_could_not_continue_a_text_are_refused():
    told = "is an encoder, which reads"
    for model_type in ENCODERS:
        with pytest.raises(UserError, match=rf"architecture.model_type: {model_type} {told}"):
            build_causal_lm(
                Architecture(model_type=model_type, options={"num_hidden_layers": 1}),
                tokenizer=tiny_tokenizer(),
                max_length=32,
                seed=0,
            )


@pytest.mark.parametrize("model_type", ["gpt_neox", "bart"])
def test_decoders_are_not_taken_for_encoders(model_type):
    model = build_causal_lm(
        Architecture(model_type=model_type, options={"num_hidden_layers": 1}),
        tokenizer=tiny_tokenizer(),
        max_length=32,
        seed=0,
    )
    assert model.config.model_type == model_type
