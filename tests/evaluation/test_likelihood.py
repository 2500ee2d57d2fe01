"""Divergence and likelihood against a slow loop in float64."""

import pytest
import torch

from pipeline.evaluation import likelihood
from pipeline.evaluation.likelihood import Batching, divergence, negative_log_likelihood
from tests.support import assert_close, tiny_llama

PROMPTS = [[5, 6, 7], [8], [9, 10], [4, 4, 4, 4]]
RESPONSES = [[11, 1], [12, 13, 14, 15, 1], [16], [17, 18]]
SETTINGS = {"prompts": PROMPTS, "responses": RESPONSES}


def slow_logprobs(model, prompt, response):
    """Log-probabilities over the vocabulary before each response token, one prefix at a time."""
    rows = []
    for length in range(len(response)):
        prefix = torch.tensor([prompt + response[:length]])
        rows.append(model.double()(prefix).logits[0, -1].log_softmax(-1))
    model.float()
    return torch.stack(rows)


@pytest.fixture(scope="module")
def models():
    return tiny_llama(seed=0), tiny_llama(seed=1)


@torch.no_grad()
def test_divergence_is_the_sum_over_response_tokens_and_vocabulary(models):
    policy, reference = models
    found = divergence(
        policy, reference=reference, batching=Batching(pad_id=0, batch_size=3), **SETTINGS
    )
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ours = slow_logprobs(policy, prompt, response)
        theirs = slow_logprobs(reference, prompt, response)
        kl = sum((p.exp() * (p - q)).sum() for p, q in zip(ours, theirs, strict=True))
        k1 = sum(ours[i, t] - theirs[i, t] for i, t in enumerate(response))
        assert_close(found.kl[row], float(kl), tolerance=1e-4)
        assert_close(found.k1[row], float(k1), tolerance=1e-4)


def test_a_policy_does_not_diverge_from_itself(models):
    found = divergence(
        models[0], reference=models[0], batching=Batching(pad_id=0, batch_size=2), **SETTINGS
    )
    assert found.kl.tolist() == [0.0] * 4
    assert found.k1.tolist() == [0.0] * 4


def test_divergence_is_positive_and_its_batches_do_not_matter(models):
    whole = divergence(
        models[0], reference=models[1], batching=Batching(pad_id=0, batch_size=4), **SETTINGS
    )
    batching = Batching(pad_id=0, batch_size=1, workers=2)
    parts = divergence(models[0], reference=models[1], batching=batching, **SETTINGS)
    assert (whole.kl > 0).all()
    assert_close(whole.kl, parts.kl, tolerance=1e-4)
    assert_close(whole.k1, parts.k1, tolerance=1e-4)


def test_no_more_than_a_piece_of_tokens_meets_the_vocabulary(models, monkeypatch):
    batching, seen = Batching(pad_id=0, batch_size=8), []
    whole = divergence(models[0], reference=models[1], batching=batching, **SETTINGS)
    full_kl = likelihood.full_kl
    monkeypatch.setattr(likelihood, "full_kl", lambda *of: seen.append(len(of[0])) or full_kl(*of))
    monkeypatch.setattr(likelihood, "PIECE_TOKENS", 2)
    pieces = divergence(models[0], reference=models[1], batching=batching, **SETTINGS)
    assert max(seen) == 2
    assert len(seen) > 1
    assert_close(pieces.kl, whole.kl)
    assert_close(pieces.k1, whole.k1)


@torch.no_grad()
def test_likelihood_counts_the_end_of_sequence(models):
    found = negative_log_likelihood(
        models[0], batching=Batching(pad_id=0, batch_size=2), **SETTINGS
    )
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        table = slow_logprobs(models[0], prompt, response)
        expected = -sum(table[i, token] for i, token in enumerate(response))
        assert_close(found[row], float(expected), tolerance=1e-4)
    # The first response ends with EOS, which is a token like the others and costs nats.
    cut = negative_log_likelihood(
        models[0], prompts=[PROMPTS[0]], responses=[[11]], batching=Batching(pad_id=0, batch_size=1)
    )
    assert found[0] > cut[0]


def test_the_expected_k1_is_the_divergence(models):
    # Over all one-token replies, weighted by the policy: sum p (log p - log q) = KL.
    policy, reference = models
    every = [[token] for token in range(24)]
    batching = Batching(pad_id=0, batch_size=24)
    settings = {"prompts": [[5, 6]] * 24, "responses": every, "batching": batching}
    found = divergence(policy, reference=reference, **settings)
    chances = (-negative_log_likelihood(policy, **settings)).exp()
    assert_close((chances * found.k1).sum(), found.kl[0], tolerance=1e-4)
