"""Our contract on Hugging Face's Trainer: logs, validation, resume points and stopping.

Trainer keeps its loop. It logs every step to `RunLogs`, which forms the means: Trainer's own are
lost when it goes on from a checkpoint in between.
"""

import functools
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from pipeline.checkpoint import StageRun
from pipeline.distributed import barrier, rank
from pipeline.errors import UserError
from pipeline.progress import progress
from pipeline.stopping import Pace
from pipeline.storage import read_json, write_json

MEANS = ("loss", "mean_token_accuracy", "entropy")
"""What is taken from Trainer's logs as the mean over the steps of a row."""
LATEST = ("grad_norm", "learning_rate")
"""What is taken as it was in the last step of a row."""
UNFINISHED = "logs.json"
"""File of a resume point: the steps since the last row of metrics."""
PICKLED = "training_args.bin"

STEADIER = (
    "Lower training.learning_rate, lengthen training.warmup_steps, or set training.precision to "
    "fp32"
)
"""What to do where a loss or gradient is not finite."""

Validate = Callable[[], Mapping[str, float]]


class RunLogs(TrainerCallback):
    """Forwards Trainer's logs to the run, a row every few steps, and shows a progress bar."""

    def __init__(self, run: StageRun, *, every: int, tokens_per_step: float) -> None:
        self.run, self.every, self.tokens_per_step = run, every, tokens_per_step
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.bar: Iterator[int] = iter(())
        self.since: tuple[int, float] = (0, 0.0)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Starts the bar and the clock, at the step training goes on from."""
        first, total = state.global_step, state.max_steps
        self.run.total_steps = total
        self.bar = progress(
            range(first, total), total=total, description=self.run.stage, initial=first
        )
        next(self.bar, None)
        self.since = (first, time.monotonic())

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Moves the bar on."""
        next(self.bar, None)

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: Any = None, **_: Any) -> None:
        """Takes one step's figures in, and logs a row when it is due."""
        state.log_history.clear()  # ours is metrics.jsonl
        for name in (*MEANS, *LATEST):
            if name in logs:
                self.steps[name].append(float(logs[name]))
        step, last = state.global_step, state.max_steps
        if self.steps and (step % self.every == 0 or step == last):
            self._log_row(step)

    def _log_row(self, step: int) -> None:
        row = {f"train/{name}": _mean(self.steps[name]) for name in MEANS if name in self.steps}
        row |= {f"train/{name}": self.steps[name][-1] for name in LATEST if name in self.steps}
        self.steps.clear()
        now = time.monotonic()
        seconds = (now - self.since[1]) / max(1, step - self.since[0])
        self.since = (step, now)
        self.run.log(step, row)
        self.run.log_timings(
            step,
            {
                "time/step_seconds": seconds,
                "time/tokens_per_second": self.tokens_per_step / max(seconds, 1e-9),
            },
        )

    def save(self, folder: Path) -> None:
        """Writes the steps since the last row into a resume point."""
        write_json(folder / UNFINISHED, self.steps)

    def load(self, folder: Path) -> None:
        """Takes up the steps of a resume point."""
        self.steps.update(read_json(folder / UNFINISHED))


class Validation(TrainerCallback):
    """Looks at the validation rows every few steps."""

    def __init__(self, run: StageRun, validate: Validate, *, every: int) -> None:
        self.run = run
        self.validate = validate
        self.every = every

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Logs the validation figures; the last step is left to the stage's full evaluation."""
        due = self.every and state.global_step % self.every == 0
        if due and state.global_step < state.max_steps:
            self.run.log(state.global_step, self.validate())


class FiniteGradients(TrainerCallback):
    """Stops on a non-finite loss or gradient before the optimizer moves."""

    def on_pre_optimizer_step(
        self, _args: Any, state: Any, _control: Any, *, model: nn.Module, **_: Any
    ) -> None:
        """Raises UserError when any gradient, and so the loss behind it, is not finite.

        All are added up first, since each look at a number makes a GPU wait.
        """
        named = model.named_parameters()
        sums = {name: weight.grad.sum() for name, weight in named if weight.grad is not None}
        if not sums or torch.isfinite(functools.reduce(torch.add, sums.values())):
            return
        for name, total in sums.items():
            if not torch.isfinite(total):
                raise UserError(
                    f"the loss or its gradient is not finite at step {state.global_step + 1} on "
                    f"rank {rank()} (first seen in {name}); the weights were not moved. {STEADIER}"
                )

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: Any = None, **_: Any) -> None:
        """Raises UserError where only the step's figures tell, as of gradients that are divided."""
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise UserError(
                    f"{name} is not finite at step {state.global_step}; the last resume point was "
                    f"saved before. {STEADIER}"
                )


class ResumePoints(TrainerCallback):
    """Saves and stops when it is due; what Trainer saves becomes a resume point of the run."""

    def __init__(self, run: StageRun, *, pace: Pace, logs: RunLogs) -> None:
        self.run, self.pace, self.logs = run, pace, logs
        self.stops = False

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks Trainer to save, or to save and stop."""
        due = self.pace.after(state.global_step)
        control.should_save |= due.save or state.global_step >= state.max_steps
        self.stops = due.stop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves Trainer's folder into a resume point, without pickled arguments.

        Trainer is told to stop only now: what it was told is part of what it saves.
        """
        source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        barrier()
        self.run.save_point(state.global_step, lambda folder: self._move(source, folder))
        if self.run.is_main:
            shutil.rmtree(source)
        control.should_training_stop |= self.stops

    def _move(self, source: Path, folder: Path) -> None:
        if not self.run.is_main:
            return
        for file in source.iterdir():
            if file.name != PICKLED:
                shutil.move(file, folder / file.name)
        self.logs.save(folder)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
