"""One update on a recorded rollout, cut, padded, ordered and shared out in every way there is.

In float64 the weights agree to 1e-9. In float32 to 1e-5: at most four AdamW steps of 3e-3, each
off by a gradient's rounding (1e-8) over its smallest divisor (epsilon, 1e-5).
Generation itself is held by test_rollout.py (batch split, order of rows, left padding), and by
processes that reply themselves here.
"""

import dataclasses
import functools

import pytest
import torch

from pipeline import models
from pipeline.ppo import experience, optimiser, passes, scorers
from pipeline.ppo import trainer as module
from pipeline.ppo.rollout import Sampled
from pipeline.sequences import Batch, collate
from pipeline.sharding import recompute
from tests.ppo.company import Company
from tests.ppo.worlds import PAD, trainer, weights
from tests.support import assert_close

TOLERANCE = {True: 1e-9, False: 1e-5}
both_precisions = pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
SHUFFLED = [7, 2, 11, 0, 9, 4, 1, 10, 6, 3, 8, 5]


@functools.cache
def recorded() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of the first update, lengths and endings of all kinds among them."""
    ppo = trainer(double=True)
    prompts = [ppo.prompts[row] for row in ppo.prompt_rows(0)]
    return prompts, ppo.sample(prompts, update=0).responses


def prepared(*, double: bool, order=range(12), **changes):
    """A trainer that will find the recorded rollout, its rows in the given order."""
    ppo = trainer(double=double, **changes)
    prompts, responses = recorded()
    ppo.prompts = [prompts[row] for row in order]
    ppo.prompt_rows = lambda number: list(range(len(prompts)))
    ppo.sample = lambda *_, **__: Sampled([responses[row] for row in order])
    return ppo


def updated(**options) -> torch.Tensor:
    """The weights after an update."""
    ppo = prepared(**options)
    ppo.update(0)
    return weights(ppo)


@functools.cache
def plain(double: bool) -> torch.Tensor:
    return updated(double=double)


def same(result: torch.Tensor, *, double: bool) -> None:
    assert not torch.equal(plain(double), weights(trainer(double=double)))
    assert_close(result, plain(double), tolerance=TOLERANCE[double])


def test_the_recorded_rollout_is_ragged():
    prompts, responses = recorded()
    assert len({len(prompt) for prompt in prompts}) > 2
    assert len({len(response) for response in responses}) > 2
    assert {response[-1] == 1 for response in responses} == {True, False}


@both_precisions
@pytest.mark.parametrize("size", [1, 2, 4])
def test_microbatches(size, double):
    same(updated(double=double, microbatch_size=size), double=double)


@both_precisions
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_packed_rows(size, workers, double):
    ppo = prepared(double=double, packed=True, microbatch_size=size, workers=workers)
    assert ppo.roles.packed
    ppo.update(0)
    same(weights(ppo), double=double)


@both_precisions
@pytest.mark.parametrize("packed", [False, True])
def test_log_probabilities_kept_from_sampling(packed, double):
    options = {"double": double, "packed": packed, "temperature": 0.8}
    kept, anew = trainer(**options), trainer(**options)
    sample = anew.sample
    anew.sample = lambda *args, **kwargs: Sampled(sample(*args, **kwargs).responses)
    for ppo in (kept, anew):
        ppo.update(0)
    assert_close(weights(kept), weights(anew), tolerance=TOLERANCE[double])


@both_precisions
@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_batches_in_which_a_rollout_is_measured(size, double, monkeypatch):
    measure = module.measure
    monkeypatch.setattr(
        module, "measure", lambda *args, **kwargs: measure(*args, **{**kwargs, "batch_size": size})
    )
    same(updated(double=double), double=double)


def padded(prompts, responses, *, pad_id, packed, left, right):
    """`collate` with more columns; positions count real tokens only, junk where there is none."""
    batch = collate(prompts, responses, pad_id=pad_id, packed=packed)
    fill = {"input_ids": 4, "position_ids": 0}
    return Batch(
        **{
            name: torch.nn.functional.pad(
                getattr(batch, name), (left, right), value=fill.get(name, False)
            )
            for name in ("input_ids", "attention_mask", "position_ids", "response_mask")
        }
    )


@both_precisions
@pytest.mark.parametrize(("left", "right"), [(0, 5), (4, 0), (3, 2)])
def test_padding(left, right, double, monkeypatch):
    for place in (passes, experience, models):
        more = functools.partial(padded, left=left, right=right)
        monkeypatch.setattr(place, "collate", more)
    same(updated(double=double), double=double)


@both_precisions
@pytest.mark.parametrize("sharing", ["separate", "trunk", "lora"])
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_side_by_side(workers, sharing, double):
    options = {"double": double, "sharing": sharing, "microbatch_size": 2}
    before, alone = (weights(prepared(**options)), updated(**options))
    assert not torch.equal(before, alone)
    assert_close(updated(workers=workers, **options), alone, tolerance=TOLERANCE[double])


def test_workers_side_by_side_make_the_same_bits_twice():
    first, second = (updated(double=False, workers=2, microbatch_size=2) for _ in range(2))
    assert torch.equal(first, second)


@both_precisions
def test_the_order_of_rows(double, monkeypatch):
    permutation = optimiser.permutation
    place = torch.tensor(SHUFFLED).argsort().numpy()  # where the shuffled rollout holds each row

    def same_minibatches(*args, size):
        return place[permutation(*args, size=size)]

    monkeypatch.setattr(optimiser, "permutation", same_minibatches)
    same(updated(double=double, order=SHUFFLED), double=double)


@both_precisions
def test_layers_that_are_computed_again(double):
    ppo, forwards = prepared(double=double), []
    for model in ppo.optimiser.models.values():
        recompute(model)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    ppo.update(0)
    same(weights(ppo), double=double)
    # of both models: 2 forward passes to measure, 4 in the steps (2 epochs of 2 minibatches), and
    # those 4 again in their backward passes
    assert len(forwards) == 2 * (2 + 4 + 4)


@both_precisions
@pytest.mark.parametrize("size", [2, 8], ids=["2", "8, more than a minibatch has rows"])
def test_processes(size, double, monkeypatch):
    plain(double)  # by one process, before there is company
    company = Company(size)
    for place in (module, optimiser, scorers):
        monkeypatch.setattr(place, "distributed", company)
    ranks = [prepared(double=double) for _ in range(size)]
    for ppo in ranks:
        ppo.optimiser.accelerator = company
    company.work(lambda rank: ranks[rank].update(0))
    for ppo in ranks:
        same(weights(ppo), double=double)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_reply_token_for_token_update_after_update(size, monkeypatch):
    expected = replies_of_one()  # before there is company
    company = Company(size)
    for place in (module, optimiser, scorers):
        monkeypatch.setattr(place, "distributed", company)
    ranks, found = [trainer(double=True) for _ in range(size)], [[] for _ in range(size)]
    for ppo, responses in zip(ranks, found, strict=True):
        ppo.optimiser.accelerator = company
        ppo.sample = _remembering(ppo.sample, responses)
    company.work(lambda rank: [ranks[rank].update(number) for number in range(3)])
    for responses in found:
        assert responses == expected
    assert expected[0] != expected[-1]


@functools.cache
def replies_of_one() -> list[list[list[int]]]:
    """The responses of three updates by a trainer that knows of no processes."""
    ppo, found = trainer(double=True), []
    ppo.sample = _remembering(ppo.sample, found)
    for number in range(3):
        ppo.update(number)
    return found


def _remembering(sample, responses):
    def sampled(*args, **options):
        result = sample(*args, **options)
        responses.append(result.responses)
        return result

    return sampled


shared = pytest.mark.parametrize("sharing", ["trunk", "lora"])


@shared
def test_processes_that_share_weights(sharing, monkeypatch):
    alone = updated(double=True, sharing=sharing)
    company = Company(2)
    for place in (module, optimiser):
        monkeypatch.setattr(place, "distributed", company)
    ranks = [prepared(double=True, sharing=sharing) for _ in range(2)]
    for ppo in ranks:
        ppo.optimiser.accelerator = company
    company.work(lambda rank: ranks[rank].update(0))
    for ppo in ranks:
        assert_close(weights(ppo), alone, tolerance=1e-9)


@both_precisions
def test_layers_that_are_computed_again_by_workers(double):
    ppo = trainer(double=double)
    for model in (ppo.roles.policy, ppo.roles.value):
        recompute(model)
    ppo.settings = dataclasses.replace(ppo.settings, workers=2, microbatch_size=2)
    ppo.optimiser = optimiser.Optimiser(
        ppo.roles, settings=ppo.settings, accelerator=ppo.optimiser.accelerator, pad_id=PAD
    )
    recorded_by = prepared(double=double)
    for name in ("prompts", "prompt_rows", "sample"):
        setattr(ppo, name, getattr(recorded_by, name))
    ppo.update(0)
    same(weights(ppo), double=double)


def test_layers_computed_again_read_each_role_through_its_own_adapter():
    ppo, forwards = prepared(double=True, sharing="lora"), []
    base = ppo.roles.policy.base.model
    recompute(base)
    base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    ppo.update(0)
    assert_close(weights(ppo), updated(double=True, sharing="lora"), tolerance=1e-9)
    # 4 roles measured in 2 batches; policy and value in 4 steps, forward and again backward
    assert len(forwards) == 4 * 2 + 2 * (4 + 4)
