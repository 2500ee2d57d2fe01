"""Log-probabilities and entropies by blocks: the formula's values and autograd's gradients."""

import math

import pytest
import torch

from pipeline import logprobs
from pipeline.errors import UserError
from pipeline.logprobs import perplexity, picked
from tests.support import assert_close

TOKENS = torch.tensor([2, 0, 4, 4, 1, 3, 2])


def plain(logits, tokens, temperature):
    """What autograd makes of the definitions."""
    rows = (logits / temperature).log_softmax(dim=-1)
    return rows[torch.arange(len(tokens)), tokens], -(rows.exp() * rows).sum(dim=-1)


def test_two_tokens_by_hand():
    # p = (1/4, 3/4): log p = -log 4 and log 3/4; H = log 4 - 3/4 log 3.
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    chosen, entropy = picked(logits, torch.tensor([0, 1]), entropy=True)
    assert_close(chosen, [-math.log(4), math.log(0.75)])
    assert_close(entropy, [math.log(4) - 0.75 * math.log(3)] * 2)


@pytest.mark.parametrize("rows_of_a_block", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_autograd(
    monkeypatch, rows_of_a_block, temperature, entropy
):
    monkeypatch.setattr(logprobs, "BLOCK", 5 * rows_of_a_block)
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 7, dtype=torch.float64)
    found = picked(logits, TOKENS, temperature=temperature, entropy=entropy)
    wanted = plain(logits, TOKENS, temperature)
    assert (found[1] is not None) == entropy
    results = []
    for figures in (found, wanted):
        pairs = zip(figures[: 1 + entropy], weights, strict=False)
        total = sum((figure * weight).sum() for figure, weight in pairs)
        results.append(torch.autograd.grad(total, logits)[0])
    assert_close(found[0], wanted[0])
    assert_close(results[0], results[1])
    if entropy:
        assert_close(found[1], wanted[1])


def test_bfloat16_logits_give_float32_figures_and_bfloat16_gradients():
    torch.manual_seed(0)
    logits = torch.randn(7, 5).bfloat16().requires_grad_()
    chosen, _ = picked(logits, TOKENS)
    assert_close(chosen, plain(logits.float(), TOKENS, 1.0)[0])
    assert chosen.dtype == torch.float32
    chosen.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_perplexity_is_a_number_or_the_model_has_diverged():
    assert perplexity(math.log(8)) == pytest.approx(8)
    for loss in (710.0, math.inf, math.nan):
        with pytest.raises(UserError, match="the model has diverged. Lower the learning rate"):
            perplexity(loss)
