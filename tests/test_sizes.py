"""Sizes of bfloat16 products on a processor recur, and what is computed stays the same."""

import pytest
import torch

from pipeline.attention import pack
from pipeline.ppo.experience import state_values
from pipeline.ppo.rollout import generate, uniforms
from pipeline.sequences import collate, response_states, response_tokens, token_logprobs
from pipeline.sizes import MULTIPLE, ROWS, filled_up, rounded
from tests.support import assert_close, tiny_llama, tiny_reward_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[13, 1], [14, 15, 16, 17, 1], [18, 19]]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_sizes_are_rounded_in_bfloat16_alone():
    assert rounded(65, multiple=64) == 65
    assert filled_up(torch.ones(3, 2)).shape == (3, 2)
    with bf16():
        assert [rounded(count, multiple=64) for count in (0, 1, 64, 65)] == [0, 64, 64, 128]
        filled = filled_up(torch.ones(3, 2))
    assert filled.shape == (MULTIPLE, 2)
    assert filled.sum() == 6


@pytest.fixture
def sizes(monkeypatch):
    """The numbers of rows of every product."""
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def recorded(values, *rest):
        seen.append(values.numel() // values.shape[-1])
        return linear(values, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    return seen


def test_packed_rows_are_read_in_sizes_that_recur(sizes):
    policy, critic = tiny_llama(), tiny_reward_model()
    assert pack(policy)
    assert pack(critic)
    batch = collate(PROMPTS, RESPONSES, pad_id=0, packed=True)
    found = {}
    for name in ("fp32", "bf16"):
        sizes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            states = response_states(policy, batch)
            logprobs = token_logprobs(policy, states, response_tokens(batch))
            values = state_values(critic, response_states(critic, batch))
        assert set(sizes) == ({MULTIPLE} if name == "bf16" else {17, 9})
        found[name] = torch.cat([logprobs, values]).detach()
    assert len(found["bf16"]) == 2 * sum(map(len, RESPONSES))
    assert_close(found["bf16"], found["fp32"], tolerance=0.05)


def test_rows_leave_a_generation_in_steps(sizes):
    policy = tiny_llama()
    numbers = uniforms(1, update=0, rows=range(30), positions=40)
    with bf16():
        sampled = generate(policy, [[5, 6]] * 30, uniforms=numbers, eos_id=1, pad_id=0)
    ends = [response[-1] == 1 or len(response) == 40 for response in sampled.responses]
    assert all(ends)
    assert len(sampled.responses) == 30
    decoded = [size for size in sizes if size not in (30, 60)]
    assert decoded
    assert all(size % ROWS == 0 for size in decoded)
