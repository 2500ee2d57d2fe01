"""The chunked language-model loss against the plain one, gradients included."""

import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from pipeline import language_loss
from pipeline.corpus import stack
from pipeline.language_loss import LanguageModelTrainer, mean_nll, plain_head, token_nll
from pipeline.lora import LoRA, with_adapter
from tests.support import MostRows, assert_close, tiny_llama


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 20])
def test_it_equals_the_plain_cross_entropy(monkeypatch, num_tokens, smoothing):
    monkeypatch.setattr(language_loss, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(language_loss, "CHUNK_LOGITS", 1)
    torch.manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (num_tokens,))
    found = token_nll(hidden, head, targets, label_smoothing=smoothing)
    expected = torch.nn.functional.cross_entropy(
        hidden @ head.T, targets, reduction="sum", label_smoothing=smoothing
    )
    assert_close(found, expected, tolerance=1e-10)
    # Times 3, so that the gradient from above counts.
    ours = torch.autograd.grad(3 * found, (hidden, head))
    theirs = torch.autograd.grad(3 * expected, (hidden, head))
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their, tolerance=1e-10)


def test_a_frozen_head_gets_no_gradient_and_changes_none():
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    head, targets = torch.randn(11, 6, dtype=torch.float64), torch.randint(0, 11, (9,))
    token_nll(hidden, head, targets).backward()
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0], tolerance=1e-10)
    assert head.grad is None


def test_large_logits_stay_finite():
    hidden, head = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    # The target is 600 nats below the other: its loss is 600.
    assert float(token_nll(hidden, head, torch.tensor([1]))) == pytest.approx(600)


def test_hidden_states_in_bfloat16_keep_the_loss_in_float32():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 6), torch.randn(11, 6)
    targets = torch.randint(0, 11, (9,))
    low = token_nll(hidden.bfloat16(), head, targets)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(token_nll(hidden, head, targets)), rel=0.02)


def test_a_head_in_bfloat16_has_its_loss_and_gradient_added_in_float32(monkeypatch):
    """As FSDP2 gathers it. In bfloat16 nothing smaller than a 256th of the sum is added to it."""
    monkeypatch.setattr(language_loss, "CHUNK_TOKENS", 1)
    monkeypatch.setattr(language_loss, "CHUNK_LOGITS", 1)
    hidden, head = torch.ones(2000, 2), torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    found = token_nll(hidden.bfloat16(), head, torch.zeros(2000, dtype=torch.long))
    found.backward()
    assert float(found.detach()) == pytest.approx(2000 * math.log(3), rel=1e-4)
    assert head.grad.dtype == torch.bfloat16
    # Each token's slope is 1/3 - 1 at the target and 1/3 at the others.
    expected = 2000 * torch.tensor([[-2 / 3] * 2, [1 / 3] * 2, [1 / 3] * 2])
    assert_close(head.grad.float() / expected, torch.ones(3, 2), tolerance=0.005)


def test_heads_that_reshape_the_logits_are_left_to_the_model():
    model = tiny_llama()
    assert plain_head(model)
    model.config.final_logit_softcapping = 30.0
    assert not plain_head(model)
    assert plain_head(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=24)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainers_loss_is_the_models_own_on_the_labelled_tokens(tmp_path, smoothing):
    model = tiny_llama()
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=smoothing
    )
    trainer = LanguageModelTrainer(language_model=model, model=model, args=arguments)
    ids = torch.randint(5, 24, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    counted = int((labels[:, 1:] != -100).sum())
    found = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(counted))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing
    )
    assert_close(found, expected, tolerance=1e-6)
    ours = torch.autograd.grad(found, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their, tolerance=1e-6)


def capped() -> Any:
    """A model whose logits are more than its states times the head."""
    model = tiny_llama()
    model.config.final_logit_softcapping = 30.0
    return model


def adapted() -> Any:
    """Adapters that are no zeros, around a causal LM."""
    model = with_adapter(tiny_llama(vocabulary=31), LoRA(rank=2), task="CAUSAL_LM", seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model.eval()


@pytest.mark.parametrize("make", [tiny_llama, capped, adapted])
def test_validation_is_the_cross_entropy_of_what_counts(monkeypatch, make):
    monkeypatch.setattr(language_loss, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(language_loss, "CHUNK_LOGITS", 1)
    model, ids = make(), torch.arange(45).view(3, 15) % 17 + 5
    labels = ids.masked_fill(ids % 4 == 0, -100)
    mask = torch.ones_like(ids)
    mask[0, 6:], labels[0, 6:] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    with MostRows(31) as most:
        found, tokens = mean_nll(model, [batch])
    assert tokens == int((labels[:, 1:] != -100).sum())
    assert found == pytest.approx(float(expected), rel=1e-6)
    if make is adapted:
        assert most.rows == 16 < tokens  # of the transposed head


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=24)).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_loss_of_packed_rows_is_the_mean_over_the_tokens_that_are_predicted(tmp_path, build):
    model = build()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = LanguageModelTrainer(language_model=model, model=model, args=arguments)
    ids = torch.randint(5, 24, (3, 4))
    batches, counted = trainer.get_batch_samples(iter([stack(ids)]), 1, torch.device("cpu"))
    found = trainer.compute_loss(model, batches[0], num_items_in_batch=counted)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert int(counted) == 3 * 3  # of four tokens in a row three are predicted
    assert_close(found, expected, tolerance=1e-6)
