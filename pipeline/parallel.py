"""Passes of models side by side on one processor: two threads, each alone, outdo two on one pass.

Small matrix products leave threads waiting for one another, and what stands between the products is
mostly serial (measured gain: docs/LOG.md, 2026-11-25).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_workers(wanted: int, device: torch.device) -> int:
    """Returns how many passes run side by side: as wanted, or for 0 two where two threads are.

    On other devices than processors it is one: there a pass fills the device.
    """
    if device.type != "cpu":
        return 1
    return wanted or min(2, torch.get_num_threads())


def side_by_side(
    job: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Iterator[Result]:
    """Yields what a job makes of each item, in their order.

    The threads of the process are divided among the workers. Gradients are on or off and autocast
    is set as for the caller; no job may write what another reads or writes.

    Args:
        job: a pass of a model.
        items: what it is given, one at a time.
        workers: jobs at the same time; 1 does them one after the other, each when it is asked for.
    """
    if min(workers, len(items)) <= 1:
        yield from map(job, items)
        return
    inherited = _Inherited()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda item: inherited.call(job, item), items)
    finally:
        torch.set_num_threads(threads)


class _Inherited:
    """What torch keeps for each thread, as it is where this is made."""

    def __init__(self) -> None:
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = torch.is_autocast_enabled("cpu")
        self.dtype = torch.get_autocast_dtype("cpu")

    def call(self, job: Callable[[Item], Result], item: Item) -> Result:
        """Returns the job's result under the same settings."""
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            torch.autocast("cpu", self.dtype, enabled=self.autocast),
        ):
            return job(item)
