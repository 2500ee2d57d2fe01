"""Training settings shared by the stages that use Hugging Face's Trainer, and their mapping to it.

Importable without torch, so that `--help` stays fast; `pipeline.fitting` holds what needs it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import require
from pipeline.distributed import on_gpu
from pipeline.errors import UserError
from pipeline.streams import short_stream

OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "stable": "warmup_stable_decay",
}
"""Our names of the learning rate's course and Transformers' names for them."""
WORKSPACE = ".trainer"
"""Folder inside the stage's folder where Trainer writes before a resume point is published."""
SORTED_MINIBATCHES = 50
"""Minibatches whose rows are sorted by length together: few enough to stay nearly random."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the weights are moved."""

    steps: int = 0
    """Optimizer steps; 0 trains for `epochs` instead."""
    epochs: float = 1.0
    """Passes over the training rows when `steps` is 0."""
    minibatch_size: int = 32
    """Rows of one optimizer step, over all processes and microbatches."""
    microbatch_size: int = 32
    """Rows of one forward pass of one process."""
    optimizer: str = "adamw"
    """adamw, or muon: Muon for the body's matrices and AdamW for the rest."""
    learning_rate: float = 1.0e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 2.0e-2
    """Peak learning rate of Muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    epsilon: float = 1.0e-8
    """AdamW's addend to the root of the mean squared gradient."""
    schedule: str = "linear"
    """After the warmup: constant, linear or cosine to zero, or stable (level, then to zero)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    decay_frac: float = 0.4
    """Share of the steps over which a `stable` schedule falls to zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    precision: str = "auto"
    """bf16 (autocast), fp32, or auto: bf16 where the processor computes it natively."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 100
    """Steps between two looks at the validation rows; 0 looks only at the end."""

    def __post_init__(self) -> None:
        for name in ("minibatch_size", "microbatch_size", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}: must be at least 1, got {value}")
        for name in ("steps", "warmup_steps", "eval_every", "max_grad_norm"):
            value = getattr(self, name)
            require(value >= 0, f"training.{name}: must be at least 0, got {value}")
        for name in ("epochs", "learning_rate", "muon_learning_rate", "epsilon"):
            value = getattr(self, name)
            require(value > 0, f"training.{name}: must be above 0, got {value}")
        for name in ("beta1", "beta2", "decay_frac"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name}: must be in [0, 1), got {value}")
        choices = {"optimizer": OPTIMIZERS, "precision": PRECISIONS, "schedule": tuple(SCHEDULES)}
        for name, allowed in choices.items():
            value = getattr(self, name)
            message = f"training.{name}: must be one of {', '.join(allowed)}, got {value!r}"
            require(value in allowed, message)
        self._check_warmup(self.steps)

    def _check_warmup(self, steps: int) -> None:
        """Raises UserError where the learning rate would not arrive at its peak; 0: not known."""
        require(
            steps == 0 or self.warmup_steps < steps,
            f"training.warmup_steps: {self.warmup_steps} of {steps} steps leave none at the peak "
            "learning rate; lower it or train for longer",
        )

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps over this many training rows.

        Raises:
            UserError: the rows fill no minibatch, or the warmup takes all steps.
        """
        if num_rows < self.minibatch_size:
            raise UserError(
                f"training.minibatch_size: {self.minibatch_size} rows do not fit into the "
                f"{num_rows} training rows; lower it or prepare more data"
            )
        steps = self.steps or max(1, int(self.epochs * (num_rows // self.minibatch_size)))
        self._check_warmup(steps)
        return steps

    def accumulation(self, world_size: int) -> int:
        """Microbatches that each process adds up before one optimizer step."""
        together = self.microbatch_size * world_size
        if self.minibatch_size % together:
            smaller = _divisor(self, world_size)
            multiple = math.ceil(self.minibatch_size / together) * together
            mend = (
                f"--training.microbatch_size={smaller} or another size"
                if smaller
                else f"--training.minibatch_size={multiple} or another number of processes"
            )
            raise UserError(
                f"training.minibatch_size: {self.minibatch_size} is not a multiple of "
                f"microbatch_size {self.microbatch_size} times {world_size} process(es); use {mend}"
            )
        return self.minibatch_size // together


def _divisor(training: Training, world_size: int) -> int:
    """Largest microbatch not above the one asked for that divides the minibatch; 0: none does."""
    sizes = range(min(training.microbatch_size, training.minibatch_size), 0, -1)
    return next((n for n in sizes if training.minibatch_size % (n * world_size) == 0), 0)


def trainer_arguments(
    training: Training,
    *,
    folder: Path,
    seed: int,
    steps: int,
    world_size: int,
    recomputes: bool = False,
) -> dict[str, Any]:
    """Returns keyword arguments of TrainingArguments or of one of TRL's subclasses.

    Rows come in the dataset's own order (`row_order` has shuffled them), so a resumed run reads
    exactly the rows that are left. Logs, evaluation and saving are ours (`pipeline.callbacks`).
    The precision is a chosen one (`StageRun.resolved`).
    """
    assert training.precision != "auto"
    decay = max(1, int(training.decay_frac * steps))
    return {
        "output_dir": str(folder / WORKSPACE),
        "max_steps": steps,
        "per_device_train_batch_size": training.microbatch_size,
        "gradient_accumulation_steps": training.accumulation(world_size),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "lr_scheduler_kwargs": {"num_decay_steps": decay} if training.schedule == "stable" else {},
        "warmup_steps": training.warmup_steps,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bf16",
        "use_cpu": not on_gpu(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "activation_checkpointing": recomputes,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": short_stream(seed, "dropout"),
        "data_seed": short_stream(seed, "dropout"),
    }


def on_one_gpu(arguments: Any) -> Any:
    """Returns Trainer's arguments for a process that trains on one GPU, however many it sees.

    By itself Trainer would copy the model to all of them (torch's DataParallel), and read as many
    times the rows in a step.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)  # noqa: SLF001 - as Trainer does for divided models
    return arguments


def row_order(lengths: Sequence[int], *, minibatch_size: int, steps: int, seed: int) -> list[int]:
    """Returns the row indices of every minibatch of the whole training, one after another.

    Each pass shuffles the rows, sorts a window of minibatches by length so that the rows of one
    minibatch pad little, and shuffles the minibatches; rows that fill no minibatch sit out the
    pass. The order is a function of the seed alone, whatever the number of processes.
    """
    generator = random.Random(f"{seed}/rows")
    order: list[int] = []
    while len(order) < steps * minibatch_size:
        order += _one_pass(lengths, minibatch_size=minibatch_size, generator=generator)
    return order[: steps * minibatch_size]


def _one_pass(
    lengths: Sequence[int], *, minibatch_size: int, generator: random.Random
) -> list[int]:
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    del rows[len(rows) // minibatch_size * minibatch_size :]
    window = SORTED_MINIBATCHES * minibatch_size
    minibatches: list[list[int]] = []
    for start in range(0, len(rows), window):
        ordered = sorted(rows[start : start + window], key=lambda row: lengths[row])
        minibatches += [
            ordered[i : i + minibatch_size] for i in range(0, len(ordered), minibatch_size)
        ]
    generator.shuffle(minibatches)
    return [row for minibatch in minibatches for row in minibatch]


def padding_frac(lengths: Sequence[int], *, microbatch_size: int) -> float:
    """Returns the share of positions that are padding when rows are cut in this order."""
    padded = sum(
        max(lengths[i : i + microbatch_size]) * len(lengths[i : i + microbatch_size])
        for i in range(0, len(lengths), microbatch_size)
    )
    return 1 - sum(lengths) / padded if padded else 0.0
