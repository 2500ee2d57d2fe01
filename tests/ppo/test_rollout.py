"""Generation: the same tokens as a plain loop, however the work is cut."""

import random

import numpy as np
import pytest
import torch

from pipeline.ppo import rollout
from pipeline.ppo.rollout import generate, sample_tokens, uniforms
from tests.support import assert_close, tiny_llama

EOS, PAD, BUDGET = 1, 0, 12


@pytest.fixture(scope="module")
def model():
    return tiny_llama().double()


@pytest.fixture(scope="module")
def prompts():
    generator = random.Random(0)
    return [[generator.randrange(2, 24) for _ in range(generator.randint(1, 9))] for _ in range(30)]


def numbers(rows):
    return uniforms(7, update=3, rows=rows, positions=BUDGET)


def plain_loop(model, prompt, uniform):
    """Sampling without cache, batch or padding: one full forward per token."""
    response = []
    for number in uniform:
        logits = model(torch.tensor([prompt + response])).logits[0, -1]
        cumulative = logits.softmax(-1).cumsum(0)
        token = int((cumulative <= number * cumulative[-1]).sum())
        response.append(token)
        if token == EOS:
            break
    return response


def run(model, prompts, rows, **options):
    return sampled(model, prompts, rows, **options).responses


def sampled(model, prompts, rows, **options):
    return generate(model, prompts, uniforms=numbers(rows), eos_id=EOS, pad_id=PAD, **options)


def test_what_is_said_of_tokens_weighs_no_more_than_they_do(model, prompts):
    """It is sent to other processes, and a view is sent with all that it is a view of."""
    for rows in sampled(model, prompts, range(len(prompts))).figures.values():
        assert all(row.untyped_storage().nbytes() == row.nbytes for row in rows)


def test_same_tokens_as_a_plain_loop(model, prompts):
    rows = list(range(len(prompts)))
    fast = run(model, prompts, rows)
    with torch.no_grad():
        slow = [plain_loop(model, prompts[row], numbers([row])[0]) for row in rows]
    assert fast == slow
    assert {len(response) for response in fast} & set(range(1, BUDGET))
    assert any(len(response) == BUDGET and response[-1] != EOS for response in fast)


@torch.no_grad()
def test_what_the_policy_said_of_each_token_is_what_a_whole_forward_says(model, prompts):
    found = sampled(model, prompts, list(range(len(prompts))), temperature=0.7, batch_size=4)
    for row, (prompt, response) in enumerate(zip(prompts, found.responses, strict=True)):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / 0.7).log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert_close(found.figures["logprobs"][row], chosen, tolerance=1e-9)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        assert_close(found.figures["entropy"][row], entropy, tolerance=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_batch_size_changes_nothing(model, prompts, batch_size):
    rows = list(range(len(prompts)))
    assert run(model, prompts, rows, batch_size=batch_size) == run(model, prompts, rows)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_side_by_side_change_nothing(model, prompts, workers):
    rows = list(range(len(prompts)))
    assert run(model, prompts, rows, workers=workers) == run(model, prompts, rows)


def test_order_of_rows_changes_nothing(model, prompts):
    rows = list(range(len(prompts)))
    shuffled = random.Random(1).sample(rows, len(rows))
    responses = run(model, [prompts[row] for row in shuffled], shuffled)
    assert responses == [run(model, prompts, rows)[row] for row in shuffled]


def test_a_response_ends_at_its_first_eos_and_keeps_it(model, prompts):
    for response in run(model, prompts, list(range(len(prompts)))):
        assert response[-1] == EOS or len(response) == BUDGET
        assert EOS not in response[:-1]


def test_uniforms_depend_on_seed_update_row_and_position_only():
    together = uniforms(1, update=2, rows=[5, 6, 7], positions=4)
    assert torch.equal(uniforms(1, update=2, rows=[7], positions=4)[0], together[2])
    assert torch.equal(uniforms(1, update=2, rows=[6], positions=2)[0], together[1, :2])
    assert not torch.equal(uniforms(2, update=2, rows=[5], positions=4)[0], together[0])
    assert not torch.equal(uniforms(1, update=3, rows=[5], positions=4)[0], together[0])


def test_no_prompts_have_no_responses(model):
    nothing = sampled(model, [], [])
    assert (nothing.responses, nothing.figures) == ([], {"logprobs": [], "entropy": []})


def test_inverse_cdf_by_hand():
    # probabilities 0.2, 0.5, 0.3: boundaries at 0.2, 0.7, 1
    logits = torch.tensor([[0.2, 0.5, 0.3]]).double().log().repeat(5, 1)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999]).double()
    tokens, logprobs, entropy = sample_tokens(logits, uniform, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3]), tolerance=1e-7)
    # -(0.2 ln 0.2 + 0.5 ln 0.5 + 0.3 ln 0.3) = 0.3219 + 0.3466 + 0.3612
    assert_close(entropy, torch.full([5], 1.0296530140645737), tolerance=1e-7)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_few_rows_at_a_time_are_drawn_as_all_at_once(monkeypatch, rows):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    uniform = uniforms(0, update=0, rows=range(7), positions=1)[:, 0]
    at_once = sample_tokens(logits, uniform, temperature=0.7)
    monkeypatch.setattr(rollout, "PIECE_NUMBERS", 11 * rows + 10)
    drawn = []
    monkeypatch.setattr(rollout, "wide", lambda some: drawn.append(len(some)) or some)
    in_pieces = sample_tokens(logits, uniform, temperature=0.7)
    assert max(drawn) == rows
    for one, other in zip(at_once, in_pieces, strict=True):
        assert torch.equal(one, other)


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        drawn, *_ = sample_tokens(logits, torch.tensor([number]).double(), temperature=1.0)
        assert drawn.tolist() == [1]


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, 2.0, 0.5]]).double().repeat(20_000, 1)
    uniform = uniforms(0, update=0, rows=[0], positions=20_000)[0]
    drawn, *_ = sample_tokens(logits, uniform, temperature=2.0)
    shares = torch.bincount(drawn, minlength=3).double() / len(drawn)
    assert_close(shares, (logits[0] / 2.0).softmax(-1), tolerance=0.01)


def test_a_model_whose_positions_matter_generates_as_a_plain_loop_does():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval().double()
    prompts = [[2, 3, 4, 5, 6], [7], [8, 9]]
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(100.0)
        model.transformer.wte.weight.mul_(20.0)
        alone = [plain_loop(model, prompt, numbers([row])[0]) for row, prompt in enumerate(prompts)]
    assert run(model, prompts, [0, 1, 2]) == alone
    assert max(map(len, alone)) > 3  # there was something to generate
