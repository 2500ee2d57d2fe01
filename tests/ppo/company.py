"""Several processes as threads of one: what the trainer knows of its companions, and no more."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

PATIENCE_SECONDS = 120
"""A process that waits longer has no companions left; the test fails instead of hanging."""


class Company:
    """Stands for `pipeline.distributed` and for the Accelerator, with one thread a rank."""

    def __init__(self, size: int) -> None:
        self.size, self.local = size, threading.local()
        self.meeting = threading.Barrier(size, timeout=PATIENCE_SECONDS)
        self.desk: list[Any] = [None] * size

    def rank(self) -> int:
        return self.local.rank

    def world_size(self) -> int:
        return self.size

    def gather_objects(self, value: Any) -> list[Any]:
        self.desk[self.rank()] = value
        self.meeting.wait()
        values = list(self.desk)
        self.meeting.wait()
        return values

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def seconds_together(self) -> float:
        return 0.0

    def even_share(self, rows: Any) -> list[Any]:
        shares = [rows[rank :: self.size] for rank in range(self.size)]
        mine = list(shares[self.rank()])
        return mine + [rows[0]] * (max(map(len, shares)) - len(mine))

    def reduce(self, tensor: torch.Tensor, *, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return torch.stack(self.gather_objects(tensor)).sum(dim=0)

    def work(self, task: Callable[[int], Any]) -> None:
        """Runs the task once a rank, side by side; raises what one of them raised."""
        errors: list[Exception] = []

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                task(rank)
            except Exception as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                self.meeting.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:  # the first one: the others only miss their companion
            raise errors[0]
