"""Passes side by side on one processor."""

import threading

import pytest
import torch

from pipeline.parallel import choose_workers, side_by_side


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers):
    meeting = threading.Barrier(workers)

    def job(item: int) -> int:
        meeting.wait(timeout=10)  # all workers are at work at once
        return item * item

    assert list(side_by_side(job, range(6), workers=workers)) == [0, 1, 4, 9, 16, 25]


def test_jobs_inherit_gradients_and_autocast_and_share_the_threads():
    def job(_: int) -> tuple[bool, bool, bool, int]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            product.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert set(side_by_side(job, range(4), workers=2)) == {(False, False, True, 1)}
        with torch.inference_mode():
            assert set(side_by_side(job, range(4), workers=2)) == {(False, True, False, 1)}
        assert set(side_by_side(job, range(4), workers=2)) == {(True, False, False, 1)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_failing_job_fails_the_caller_and_gives_the_threads_back():
    def job(item: int) -> int:
        raise ValueError(f"job {item}")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="job 0"):
        list(side_by_side(job, range(4), workers=2))
    assert torch.get_num_threads() == before


def test_two_passes_where_two_threads_are_and_one_on_other_devices():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert choose_workers(0, torch.device("cpu")) == 1
        torch.set_num_threads(4)
        assert choose_workers(0, torch.device("cpu")) == 2
        assert choose_workers(3, torch.device("cpu")) == 3
    finally:
        torch.set_num_threads(before)
    assert choose_workers(0, torch.device("cuda")) == choose_workers(2, torch.device("cuda")) == 1
