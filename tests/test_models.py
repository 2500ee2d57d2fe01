"""Models and tokenizers from folders, random models from a configuration, reward scores."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.errors import UserError
from pipeline.models import (
    build_causal_lm,
    choose_precision,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    score_responses,
)
from pipeline.tokenizer import train_tokenizer
from tests.evaluation.fakes import tiny_tokenizer
from tests.support import assert_close, tiny_llama, tiny_reward_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello there, friend"] * 5, vocabulary_size=300)


def build(tokenizer, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    architecture = Architecture(
        model_type=options.pop("model_type", "llama"),
        options={**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, **options},
    )
    return build_causal_lm(architecture, tokenizer=tokenizer, max_length=32, seed=3)


def test_a_random_model_is_sized_to_its_tokenizer_and_follows_the_seed(tokenizer):
    model = build(tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id != model.config.eos_token_id
    assert torch.equal(model.lm_head.weight, build(tokenizer).lm_head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, "architecture.model_type: 'lama' unknown"),
        ({"hiden_size": 4}, "llama has no .*hiden_size"),
        ({"hidden_size": 15}, "hidden_size 15 is not a multiple of num_attention_heads 2"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of"),
    ],
)
def test_a_wrong_architecture_is_one_line(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        build(tokenizer, **options)


def test_other_architectures_are_built(tokenizer):
    architecture = Architecture(
        model_type="gpt2", options={"n_embd": 16, "n_layer": 1, "n_head": 2}
    )
    model = build_causal_lm(architecture, tokenizer=tokenizer, max_length=32, seed=0)
    assert model.config.n_positions == 32
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_loading_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no model could be loaded"):
        load_causal_lm(tmp_path)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_a_model_that_scores_texts_is_no_language_model(tmp_path):
    tiny_reward_model().save_pretrained(tmp_path)
    told = "holds LlamaForSequenceClassification, which scores texts and writes none"
    with pytest.raises(UserError, match=told):
        load_causal_lm(tmp_path)


def test_a_reward_model_needs_one_label_and_its_constants(tmp_path):
    model = tiny_reward_model()
    model.save_pretrained(tmp_path / "good")
    loaded = load_reward_model(tmp_path / "good")
    assert loaded.config.reward_std == 2.0
    assert not loaded.training  # dropout is off
    del model.config.reward_mean
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(
        UserError, match="bare/config.json lacks reward_mean and reward_std. Run: make bare RUN="
    ):
        load_reward_model(tmp_path / "bare")
    tiny_llama().save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match="several labels"):
        load_reward_model(tmp_path / "lm")


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path, tokenizer):
    import copy

    for change, message in (
        ({"chat_template": None}, "no chat template"),
        ({"eos_token": None}, "no EOS"),
        ({"pad_token": tokenizer.eos_token}, "PAD must be a token of its own"),
    ):
        broken = copy.deepcopy(tokenizer)
        for name, value in change.items():
            setattr(broken, name, value)
        folder = tmp_path / next(iter(change))
        broken.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder)


def test_scores_are_normalised_read_at_the_last_token_and_independent_of_batching():
    model = tiny_reward_model().double()
    prompts, responses = [[5, 6, 7], [8], [4, 4]], [[9, 1], [10, 11, 12, 1], [3, 1]]
    batched = score_responses(model, prompts, responses, pad_id=0)
    one_by_one = score_responses(model, prompts, responses, pad_id=0, batch_size=1)
    assert_close(one_by_one, batched)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            raw = model(torch.tensor([prompt + response])).logits[0, 0]
        assert_close(batched[row], (float(raw) - 0.25) / 2.0)


def test_precision_is_as_wanted_or_as_the_processor_allows():
    assert choose_precision("fp32") == "fp32"
    assert choose_precision("bf16") == "bf16"
    assert choose_precision("auto") in ("bf16", "fp32")
    with pytest.raises(UserError, match="precision: auto, bf16 or fp32, got 'half'"):
        choose_precision("half")


@pytest.mark.parametrize(("major", "expected"), [(7, "fp32"), (8, "bf16")])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, major, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda _: True)
    assert choose_precision("auto") == expected


def test_a_chat_template_that_leaves_the_messages_out_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    assert "in messages" in template
    tokenizer.chat_template = template.replace("in messages", "in essages")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="chat template makes nothing of a prompt"):
        load_tokenizer(tmp_path)
