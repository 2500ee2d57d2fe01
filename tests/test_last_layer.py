"""A last layer that computes what is wanted: the same states and gradients, from fewer rows."""

import copy

import pytest
import torch
from torch import nn

from pipeline import attention
from pipeline.attention import pack
from pipeline.last_layer import only
from pipeline.models import last_token_scores
from pipeline.sequences import collate, response_states
from pipeline.sharding import recompute
from tests.support import assert_close, tiny_llama, tiny_reward_model
from tests.test_attention import PACKING, built

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[13, 1], [14, 15, 16, 17, 1], [18, 19]]
READ, WANTED = 17, 9
MIXTURE = {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4}
KINDS = {**PACKING, "qwen3_moe": {**MIXTURE, "num_experts_per_tok": 2, "num_key_value_heads": 2}}


def states_and_gradients(model, *, packed):
    batch = collate(PROMPTS, RESPONSES, pad_id=0, packed=packed)
    states = response_states(model, batch)
    model.zero_grad()
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return states.detach(), torch.cat([p.grad.flatten() for p in model.base_model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_whole_layers(kind):
    model = built(kind, KINDS[kind])
    if kind in PACKING:  # products of experts exist up to float32
        model.double()
    whole = states_and_gradients(model, packed=False)
    assert pack(model)
    spared = states_and_gradients(model, packed=True)
    assert_close(spared[0], whole[0])
    assert_close(spared[1], whole[1])


@pytest.fixture
def rows(monkeypatch):
    """The numbers of rows of every product."""
    seen: list[int] = []
    linear = nn.functional.linear

    def recorded(values, *rest):
        seen.append(values.numel() // values.shape[-1])
        return linear(values, *rest)

    monkeypatch.setattr(nn.functional, "linear", recorded)
    return seen


def test_five_of_the_last_layers_seven_products_read_what_is_wanted(rows):
    model = tiny_llama()
    assert pack(model)
    rows.clear()
    states = response_states(model, collate(PROMPTS, RESPONSES, pad_id=0, packed=True))
    assert len(states) == WANTED
    # the first layer: q k v o gate up down; the last: q, k v, o gate up down
    assert rows == [READ] * 7 + [WANTED] + [READ] * 2 + [WANTED] * 4


def test_a_score_needs_the_last_token_alone(rows):
    model = tiny_reward_model()
    whole = last_token_scores(model, PROMPTS, RESPONSES, pad_id=0)
    assert pack(model)
    rows.clear()
    assert_close(last_token_scores(model, PROMPTS, RESPONSES, pad_id=0), whole)
    assert rows == [READ] * 7 + [3] + [READ] * 2 + [3] * 5


def test_a_copy_of_the_model_has_gradients_of_its_own():
    model = tiny_llama()
    assert pack(model)
    twin = copy.deepcopy(model)
    states_and_gradients(twin, packed=True)
    assert all(p.grad is None for p in model.parameters())
    assert twin.base_model.layers[-1].mlp.down_proj.weight.grad.abs().sum() > 0


def test_a_layer_that_is_computed_again_leaves_out_the_same(rows):
    model = tiny_llama()
    model.double()
    whole = states_and_gradients(model, packed=False)
    recompute(model)
    assert pack(model)
    rows.clear()
    again = states_and_gradients(model, packed=True)
    assert_close(again[0], whole[0])
    assert_close(again[1], whole[1])
    first, last = [READ] * 7, [WANTED] + [READ] * 2 + [WANTED] * 4
    assert rows == first + last + last + first


def test_a_layer_that_looks_beside_itself_is_left_whole():
    model = tiny_llama()
    last = model.base_model.layers[-1]
    last.mlp.register_forward_pre_hook(lambda _, x: (x[0] + x[0].mean(dim=1, keepdim=True),))
    assert not pack(model)  # it does not even read rows apart
    last = (model := tiny_llama()).base_model.layers[-1]

    class Shifted(nn.Linear):
        """Adds what stands one place before, but for the first of a row of three."""

        def forward(self, values):
            made = super().forward(values)
            return made + (made.roll(1, dims=1) if values.shape[1] not in (5, 7, 12) else 0)

    last.self_attn.o_proj.__class__ = Shifted
    assert pack(model)
    assert not last.self_attn.o_proj._forward_hooks
    assert not last.mlp._forward_pre_hooks


def test_whoever_wants_nothing_in_particular_gets_everything():
    model = tiny_llama()
    ids = torch.arange(2, 10)[None]
    before = model(input_ids=ids).logits
    assert pack(model)
    with pytest.raises(ValueError, match="stop"), only(torch.tensor([1]), length=8):
        raise ValueError("stop")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert attention.is_packed(model)
