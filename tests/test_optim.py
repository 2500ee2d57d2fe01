"""Muon for the body's matrices and AdamW for the rest, as one optimizer."""

import copy
import dataclasses

import pytest
import torch

from pipeline.optim import build_optimizer, orthogonalised, split_parameters
from pipeline.training import Training
from tests.support import assert_close, tiny_llama, tiny_reward_model

MUON = Training(optimizer="muon", learning_rate=1e-2, muon_learning_rate=2e-2, weight_decay=0.1)


def names_of(model, parameters):
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, 24, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_embeddings_heads_and_norms_are_not_the_bodys_matrices():
    model = tiny_llama()
    matrices, outer, vectors = split_parameters(model)
    assert names_of(model, outer) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("norm" in name for name in names_of(model, vectors))
    assert {name.split(".")[-2] for name in names_of(model, matrices)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(matrices) + len(outer) + len(vectors) == len(list(model.parameters()))


def test_the_score_head_of_a_reward_model_is_not_a_body_matrix():
    model = tiny_reward_model()
    _, outer, _ = split_parameters(model)
    assert "score.weight" in names_of(model, outer)


def test_tied_embeddings_move_once():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(split_parameters(model)[1]) == 1


def test_frozen_parameters_are_left_out():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    for part in split_parameters(model):
        assert "lm_head.weight" not in names_of(model, part)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_matrices_decay(kind):
    model = tiny_llama()
    optimizer = build_optimizer(model, Training(optimizer=kind, weight_decay=0.1))
    for group in optimizer.param_groups:
        decays = group["weight_decay"] > 0
        names = names_of(model, group["params"])
        assert all(decays == ("proj" in name) for name in names)


def test_each_half_moves_as_it_would_alone():
    together, apart = tiny_llama(), tiny_llama()
    matrices, outer, vectors = split_parameters(apart)
    muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(outer + vectors, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = build_optimizer(together, dataclasses.replace(MUON, precision="bf16"))
    for seed in range(3):
        step(together, optimizer, seed)
        torch.manual_seed(seed)
        ids = torch.randint(0, 24, (2, 8))
        apart(input_ids=ids, labels=ids).loss.backward()
        for half in (muon, adamw):
            half.step()
            half.zero_grad()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (12, 12)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_levels_its_values(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalised(matrix, dtype=torch.float32) @ right.T
    assert_close(inner - inner.diag().diag(), torch.zeros_like(inner))
    assert 0.5 < inner.diag().min() < inner.diag().max() < 1.3


def test_a_matrix_without_gradient_direction_stays_finite():
    assert_close(orthogonalised(torch.zeros(3, 4), dtype=torch.float32), torch.zeros(3, 4))


def test_a_schedule_sees_every_group():
    optimizer = build_optimizer(tiny_llama(), MUON)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]


def test_saved_and_loaded_state_continues_exactly(tmp_path):
    straight = tiny_llama()
    optimizer = build_optimizer(straight, MUON)
    step(straight, optimizer, 0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(straight)
    again = build_optimizer(resumed, MUON)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for seed in (1, 2):
        step(straight, optimizer, seed)
        step(resumed, again, seed)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_closure_gives_its_loss():
    optimizer = build_optimizer(tiny_llama(), MUON)
    assert optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_first_step_of_adamw_shows_its_epsilon(kind):
    """At the first step Adam moves by lr g / (|g| + epsilon): half of lr where |g| is epsilon."""
    model = tiny_llama()
    training = Training(optimizer=kind, learning_rate=0.1, epsilon=3.0)
    optimizer = build_optimizer(model, training)
    head = model.lm_head.weight
    before = head.detach().clone()
    head.grad = torch.full_like(head, 3.0)
    optimizer.step()
    assert_close(before - head, torch.full_like(head, 0.05))
