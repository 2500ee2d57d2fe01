"""Layers of the trained models through torch.compile, and after how many steps that has paid."""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from pipeline import distributed
from pipeline.attention import leave_uncompiled
from pipeline.config import require
from pipeline.ppo.experience import Roles
from pipeline.ppo.passes import Crew, Job
from pipeline.ppo.settings import Settings
from pipeline.sharding import layers_of

log = logging.getLogger(__name__)

TRIALS = 2
"""Runs of a step that are timed, of which the fastest counts."""
COMPILERS = ("g++", "clang++", "c++")


class CompiledCrew(Crew):
    """Workers whose layers are compiled, all but those that are hooked into.

    Sampling and scoring read the same layers as they are: a cache that grows, or passes without
    gradients, would be compiled again and again.
    """

    def __init__(self, roles: Roles, settings: Settings) -> None:
        """Prepares the layers.

        Raises:
            UserError: there is no C++ compiler, which a processor's kernels need.
        """
        super().__init__(roles, settings)
        require(
            roles.policy.device.type != "cpu" or any(map(shutil.which, COMPILERS)),
            f"optimisation.compile: needs a C++ compiler ({', '.join(COMPILERS)}) on PATH and none "
            "is there. Install one (Debian, Ubuntu: apt install g++), or set it to false",
        )
        leave_uncompiled()
        layers = dict.fromkeys(layer for worker in self.workers for layer in _layers(worker.roles))
        self.forwards = {layer: torch.compile(layer.forward, dynamic=True) for layer in layers}
        self.steps = settings.updates * settings.steps_per_update
        self.tried = False

    def backward(self, jobs: Sequence[Job]) -> list[dict[str, float]]:
        """Returns the sums of the passes after adding their gradients to those of the roles."""
        if not self.tried:
            self._try(jobs)
        with self._compiled():
            return super().backward(jobs)

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        before = {layer: layer.forward for layer in self.forwards}
        for layer, forward in self.forwards.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer, forward in before.items():
                layer.forward = forward

    def _try(self, jobs: Sequence[Job]) -> None:
        """Says after how many steps like this one compiling has paid; leaves no gradients."""
        self.tried = True

        def seconds(run: Callable[[Sequence[Job]], object]) -> float:
            start = time.perf_counter()
            run(jobs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            for worker in self.workers:
                for parameter in worker.parameters():
                    parameter.grad = None
            return time.perf_counter() - start

        as_written = super().backward
        plain = min([seconds(as_written) for _ in range(TRIALS + 1)][1:])
        first = seconds(self.backward)
        fast = min(seconds(self.backward) for _ in range(TRIALS))
        if distributed.is_main():
            log.info("ppo: %s", break_even(first - fast, plain=plain, fast=fast, steps=self.steps))


def break_even(compiling: float, *, plain: float, fast: float, steps: int) -> str:
    """Returns in words when the seconds of compiling have paid, by those of one of the steps."""
    told = f"compiled in {compiling:.0f} s; a step takes {fast:.3g} s instead of {plain:.3g}"
    mend = "set optimisation.compile to false"
    if fast >= plain:
        return f"{told}: it never pays here, {mend}"
    needed = math.ceil(compiling / (plain - fast))
    if needed > steps:
        return f"{told}: it pays after {needed:,} steps, and there are {steps:,}; {mend}"
    return f"{told}: it has paid after {needed:,} of {steps:,} steps"


def _layers(roles: Roles) -> list[nn.Module]:
    """Returns the layers of what is trained that nothing hooks into."""
    found = [
        layer for role in filter(None, (roles.policy, roles.value)) for layer in layers_of(role)
    ]
    return [layer for layer in found if not any(map(_is_hooked, layer.modules()))]


def _is_hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)  # noqa: SLF001 - no other way to ask
