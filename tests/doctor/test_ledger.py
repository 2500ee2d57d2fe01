"""The ledger: bytes and operations counted by hand on tensors without contents."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from pipeline.doctor.ledger import Ledger, hollow, made_up
from pipeline.doctor.machine import Rates

RATES = Rates(fp32_flops=1e6, bf16_flops=4e6, bandwidth=1e9, call_seconds=0.0)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with made_up():
        return torch.empty(*shape, dtype=dtype)


def test_bytes_are_counted_while_they_are_alive():
    ledger, weights = Ledger(RATES), empty(100)
    ledger.hold([weights, weights[10:]])  # a view is no memory of its own
    assert ledger.live == 400
    with ledger:
        doubled = weights + weights
        assert ledger.live == 800
        again = doubled * 2
        assert (ledger.live, ledger.peak) == (1200, 1200)
        del doubled
        assert (ledger.live, ledger.peak) == (800, 1200)
        ledger.restart()
        assert ledger.peak == 800
    assert again.shape == (100,)


def test_what_the_way_back_needs_is_alive_until_then():
    ledger, weight = Ledger(RATES), nn.Parameter(empty(10, 10))
    rows = empty(5, 10)
    ledger.hold([weight, rows])
    with ledger:
        loss = (rows @ weight).relu().sum()
        # 400 + 200 before; relu's result (200) is kept for its gradient, the sum has 4 bytes
        assert ledger.live == 600 + 200 + 4
        loss.backward()
        del loss
    assert ledger.live == 600 + 400  # and the gradient


def test_what_would_fill_the_memory_has_no_contents(monkeypatch):
    monkeypatch.setattr("pipeline.doctor.ledger.MOST_NUMBERS", 100)
    ledger = Ledger(RATES)
    with ledger:
        few, row = torch.ones(10), torch.ones(1, 20)
        assert not isinstance(few + 1, FakeTensor)
        assert isinstance(few[:, None] + row, FakeTensor)
        assert isinstance(torch.ones(11, 10), FakeTensor)
        assert isinstance(torch.cat([few] * 11), FakeTensor)
        assert ledger.peak >= 4 * 200  # and counts all the same


def test_products_take_their_operations_and_other_work_its_bytes():
    left, right, long = empty(4, 8), empty(8, 16), empty(1000)
    low = [part.to(torch.bfloat16) for part in (left, right)]
    ledger = Ledger(RATES)
    with ledger:
        left @ right
        assert ledger.flops == 2 * 4 * 8 * 16
        assert ledger.seconds == pytest.approx(1024 / 1e6)
        ledger.restart()
        low[0] @ low[1]
        assert ledger.seconds == pytest.approx(1024 / 4e6)
        ledger.restart()
        long * long
        assert ledger.seconds == pytest.approx(3 * 4000 / 1e9)


def test_attention_counts_two_products_forward_and_five_backward():
    ledger = Ledger(RATES)
    parts = [empty(2, 3, 16, 8).requires_grad_() for _ in range(3)]
    with ledger:
        out = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        assert ledger.flops == 2 * (2 * 2 * 3 * 16 * 16 * 8)
        ledger.restart()
        out.sum().backward()
    assert ledger.flops == 5 * (2 * 2 * 3 * 16 * 16 * 8)


def test_a_known_mask_picks_its_rows_and_an_unknown_one_none():
    values, mask = empty(3, 4), torch.tensor([True, False, True])
    with Ledger(RATES):
        assert values[mask].shape == (2, 4)
        assert torch.arange(3)[empty(3) > 0].shape == (0,)
        assert float(values.sum()) == 0.0
        assert bool((values > 0).all()) is False


def test_a_hollow_model_keeps_ties_dtypes_and_what_is_frozen():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(3, 5, bias=False), "b": nn.Linear(3, 5)})
    model["b"].weight = model["a"].weight
    model["a"].weight.requires_grad_(False)
    hollow(model)
    assert model["a"].weight is model["b"].weight
    assert not model["a"].weight.requires_grad
    assert model["b"].bias.requires_grad
    assert model["b"].bias.device.type == "cpu"
