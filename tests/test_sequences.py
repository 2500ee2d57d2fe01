"""Batches of prompt + response, and log-probabilities of response tokens."""

from types import SimpleNamespace

import pytest
import torch

from pipeline import sequences
from pipeline.sequences import (
    collate,
    next_logits,
    pad_tokens,
    response_states,
    response_tokens,
    text_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from tests.support import MostRows, assert_close, tiny_llama

PROMPTS, RESPONSES = [[5, 6, 7], [8]], [[9, 1], [10, 11, 12]]


def test_collate_by_hand():
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 1], [8, 10, 11, 12, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert batch.response_mask.tolist() == [
        [False, False, False, True, True],
        [False, True, True, True, False],
    ]


def test_logprobs_are_those_of_each_row_alone():
    model = tiny_llama().double()
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    with torch.no_grad():
        states, tokens = response_states(model, batch), response_tokens(batch)
        logprobs = token_logprobs(model, states, tokens, temperature=0.7)
        chosen = pad_tokens(logprobs, batch.response_mask)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logits = model(torch.tensor([prompt + response])).logits[0] / 0.7
            for offset, token in enumerate(response):
                position = len(prompt) + offset
                expected = logits[position - 1].log_softmax(-1)[token]
                assert_close(chosen[row, position], expected)
    assert bool((chosen[~batch.response_mask] == 0).all())


def test_entropy_by_hand():
    # (1/2, 1/2): ln 2 = 0.69315; (1/4, 3/4): ln(4)/4 + 3/4 ln(4/3) = 0.56234
    logits = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).double().log()
    model = SimpleNamespace(get_output_embeddings=torch.nn.Identity)
    chosen, entropy = token_logprobs_and_entropy(model, logits, torch.tensor([0, 1]))
    assert_close(chosen.exp(), [0.5, 0.75])
    assert_close(entropy, [0.6931471805599453, 0.5623351446188083])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_of_tokens_change_neither_figures_nor_gradients(size, monkeypatch):
    def computed():
        model = tiny_llama().double()
        batch = collate(PROMPTS, RESPONSES, pad_id=0)
        states, tokens = response_states(model, batch), response_tokens(batch)
        chosen, entropy = token_logprobs_and_entropy(model, states, tokens, temperature=0.7)
        assert_close(token_logprobs(model, states, tokens, temperature=0.7), chosen)
        (chosen.square().sum() + entropy.sum()).backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        return torch.cat([chosen.detach(), entropy.detach(), *gradients])

    whole = computed()
    monkeypatch.setattr(sequences, "PIECE_TOKENS", size)
    assert_close(computed(), whole, tolerance=1e-12)


def test_text_is_read_as_the_model_reads_it_in_pieces(monkeypatch):
    model, ids = tiny_llama(vocabulary=31).double(), torch.arange(26).view(2, 13) + 5
    logprobs = model(ids).logits[:, :-1].log_softmax(dim=-1)
    expected = logprobs.gather(2, ids[:, 1:, None])[:, :, 0]
    theirs = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    monkeypatch.setattr(sequences, "PIECE_TOKENS", 3)
    with MostRows(31) as most:
        found = text_logprobs(model, ids)
        ours = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    assert most.rows == 16  # of the transposed head; 24 tokens are predicted
    assert_close(found, expected)
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their)


def test_more_padding_changes_nothing():
    model = tiny_llama().double()
    with torch.no_grad():
        tight = next_logits(
            model, response_states(model, collate(PROMPTS[:1], RESPONSES[:1], pad_id=0))
        )
        more = collate([*PROMPTS[:1], [4] * 9], [*RESPONSES[:1], [3] * 9], pad_id=0)
        loose = next_logits(model, response_states(model, more))
    assert_close(loose[:2], tight)


def test_logits_are_at_least_float32():
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        states = response_states(model, collate(PROMPTS, RESPONSES, pad_id=0))
        logits = next_logits(model, states)
    assert logits.dtype == torch.float32
    assert logits.shape == (5, 24)


def test_pad_tokens_fills_the_mask_row_by_row():
    mask = torch.tensor([[True, False], [True, True]])
    assert pad_tokens(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1.0, 0.0], [2.0, 3.0]]
