"""Ways of devices: blocks that count for all, and what a GPU does without."""

import pytest
import torch

from pipeline import logprobs, sizes
from pipeline.distributed import on_gpu
from pipeline.doctor.ledger import Ledger, made_up
from pipeline.doctor.machine import Machine, Rates
from pipeline.doctor.needs import Planner
from pipeline.doctor.ways import ways_of
from pipeline.ppo import rollout
from tests.doctor.test_rehearsal import BLUEPRINT

RATES = Rates(fp32_flops=1e9, bf16_flops=1e9, bandwidth=1e9)


def picked(*, is_gpu: bool | None) -> tuple[float, int]:
    """Returns seconds and peak of picking 64 tokens of 100,000, two of them in a block."""
    ledger = Ledger(RATES)
    with made_up():
        logits, tokens = torch.empty(64, 100_000), torch.zeros(64, dtype=torch.long)
    ledger.hold([logits])
    with ledger:
        if is_gpu is None:
            logprobs.picked(logits, tokens, entropy=True)
        else:
            with ways_of(ledger, is_gpu=is_gpu):
                logprobs.picked(logits, tokens, entropy=True)
    return ledger.seconds, ledger.peak


def test_one_block_counts_for_all_that_are_alike():
    seconds, peak = picked(is_gpu=False)
    expected_seconds, expected_peak = picked(is_gpu=None)
    assert seconds == pytest.approx(expected_seconds, rel=0.01)
    assert peak == expected_peak


def test_a_gpu_takes_all_rows_together():
    assert picked(is_gpu=True)[1] > picked(is_gpu=False)[1] + 2 * 64 * 100_000 * 4


def test_a_gpu_rounds_no_sizes_and_draws_all_rows_together():
    with torch.autocast("cpu", torch.bfloat16), ways_of(Ledger(RATES), is_gpu=True):
        assert sizes.filled_up(torch.zeros(65, 2)).shape == (65, 2)
        assert rollout.PIECE_NUMBERS > 256 * 200_000
    with torch.autocast("cpu", torch.bfloat16), ways_of(Ledger(RATES), is_gpu=False):
        assert sizes.filled_up(torch.zeros(65, 2)).shape == (128, 2)


def test_a_processor_chooses_its_own_precision_though_a_gpu_is_here(monkeypatch):
    def asked(**_):
        raise AssertionError

    here = Machine(name="", processes=1, memory=1, rates=RATES, is_gpu=False)
    planner = Planner(blueprint=BLUEPRINT, machine=here, ranking=2)
    expected = planner.precision("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    assert planner.precision("auto") == expected
    with ways_of(Ledger(RATES), is_gpu=False):
        assert not on_gpu()
