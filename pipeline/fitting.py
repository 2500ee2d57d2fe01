"""What the stages on Hugging Face's Trainer share: callbacks, resume points, validation, saving.

Trainer keeps its loop; logs, evaluation and resume points follow our contract through callbacks.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

from pipeline.checkpoint import StageRun
from pipeline.distributed import barrier, gather_objects, rank, world_size
from pipeline.errors import UserError
from pipeline.lora import ADAPTER, merged, write_adapter
from pipeline.progress import progress
from pipeline.restricted import restricted
from pipeline.training import WORKSPACE

IGNORED = -100
"""Label of a position that does not count."""
METRICS = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy")
"""What is taken from Trainer's logs: the rest are clocks, or sums that restart on resuming."""

Validate = Callable[[], Mapping[str, float]]


class RunLogs(TrainerCallback):
    """Forwards Trainer's logs to the run and shows a progress bar."""

    def __init__(self, run: StageRun, *, tokens_per_step: float) -> None:
        self.run = run
        self.tokens_per_step = tokens_per_step
        self.bar: Iterator[int] = iter(())
        self.since: tuple[int, float] = (0, 0.0)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Starts the bar and the clock, at the step training goes on from."""
        first, total = state.global_step, state.max_steps
        self.bar = progress(
            range(first, total), total=total, description=self.run.stage, initial=first
        )
        next(self.bar, None)
        self.since = (first, time.monotonic())

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Moves the bar on."""
        next(self.bar, None)

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: Any = None, **_: Any) -> None:
        """Splits a line of logs into what was learned and what the clock says."""
        learned = {f"train/{name}": float(logs[name]) for name in METRICS if name in logs}
        if not learned:
            return
        step, now = state.global_step, time.monotonic()
        seconds = (now - self.since[1]) / max(1, step - self.since[0])
        self.since = (step, now)
        self.run.log(step, learned)
        self.run.log_timings(
            step,
            {
                "time/step_seconds": seconds,
                "time/tokens_per_second": self.tokens_per_step / max(seconds, 1e-9),
            },
        )


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
        """Raises UserError when any gradient, and so the loss behind it, is not finite."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad.sum()):
                raise UserError(
                    f"the loss or its gradient is not finite at step {state.global_step + 1} on "
                    f"rank {rank()} (first seen in {name}); the weights were not moved. Lower "
                    f"training.learning_rate, lengthen training.warmup_steps, or set "
                    f"training.precision to fp32"
                )


class ResumePoints(TrainerCallback):
    """Publishes what Trainer saves as a resume point of the run, without pickled arguments."""

    def __init__(self, run: StageRun) -> None:
        self.run = run

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Moves Trainer's folder into a resume point."""
        source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        barrier()
        self.run.save_point(state.global_step, lambda folder: self._move(source, folder))
        if self.run.is_main:
            shutil.rmtree(source)

    def _move(self, source: Path, folder: Path) -> None:
        if not self.run.is_main:
            return
        for file in source.iterdir():
            if file.name != "training_args.bin":
                shutil.move(file, folder / file.name)


def prefer_fast_attention(model: PreTrainedModel | PeftModel, *, bf16: bool) -> None:
    """Chooses attention by plain matrix products where that is faster: in bf16 on a processor.

    There the fused kernel is the slow part (a training step of a 3.3M model, 32 rows of 128
    tokens: 0.33 s against 0.29 s); it saves memory only in rows much longer than ours.
    """
    if bf16 and model.device.type == "cpu" and not torch.cuda.is_available():
        model.set_attn_implementation("eager")


def fit(
    trainer: Trainer,
    run: StageRun,
    *,
    validate: Validate,
    eval_every: int,
    tokens_per_step: float,
) -> float:
    """Returns tokens per second after training to the last step, from the newest resume point.

    Args:
        trainer: built from `pipeline.training.trainer_arguments`.
        run: the stage's folder; receives metrics, timings and resume points.
        validate: returns the validation figures of the model as it is.
        eval_every: steps between two looks at them; 0 never looks while training.
        tokens_per_step: tokens of one optimizer step over all processes, for the throughput.

    Raises:
        UserError: a loss or gradient is not finite.
    """
    transformers_logging.disable_progress_bar()
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(RunLogs(run, tokens_per_step=tokens_per_step))
    trainer.add_callback(FiniteGradients())
    trainer.add_callback(Validation(run, validate, every=eval_every))
    trainer.add_callback(ResumePoints(run))
    prefer_fast_attention(trainer.model, bf16=trainer.args.bf16)
    point = run.latest_point()
    started = time.monotonic()
    folder = point[1] if point else None
    with restricted(folder):
        trainer.train(resume_from_checkpoint=folder and str(folder))
    seconds = time.monotonic() - started
    barrier()
    if run.is_main:
        shutil.rmtree(run.path / WORKSPACE, ignore_errors=True)
    steps = trainer.state.global_step - (point[0] if point else 0)
    return steps * tokens_per_step / seconds


def merge_adapter(
    trainer: Trainer, run: StageRun, *, base: Path, load: Callable[[], PreTrainedModel]
) -> None:
    """Writes a trained adapter to adapter/ and puts the merged model in the trainer's place.

    Merged are weights of full precision, also where the adapter was trained on 4-bit ones. Where
    all weights were trained there is nothing to do.

    Args:
        trainer: at its end.
        run: whose folder gets the adapter.
        base: folder of the model that the adapter was trained on.
        load: returns that model.
    """
    model = trainer.model
    if not isinstance(model, PeftModel):
        return
    if run.is_main:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        write_adapter(run.path / ADAPTER, model.peft_config["default"], weights, base=base)
    barrier()
    trainer.model = merged(load(), run.path / ADAPTER).to(trainer.args.device)


def save_model(trainer: Trainer, folder: Path) -> None:
    """Writes weights, configuration and tokenizer as a plain Hugging Face folder."""
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)


def mean_nll(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> tuple[float, int]:
    """Returns the negative log-likelihood per labelled token in nats, and the number of those.

    The processes share the batches; the mean is over tokens, not over batches.

    Args:
        model: causal language model; left in the mode it was in.
        batches: input_ids, labels (-100 where a position does not count) and, where rows are
            padded, attention_mask.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        mine = batches[rank() :: world_size()]
        for batch in progress(mine, total=len(mine), description="loss", leave=False):
            nll, tokens = _batch_nll(model, batch)
            total, count = total + nll, count + tokens
    model.train(was_training)
    parts = gather_objects((total, count))
    tokens = sum(part[1] for part in parts)
    return math.fsum(part[0] for part in parts) / max(1, tokens), tokens


def _batch_nll(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[float, int]:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:].to(device)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    nll = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return float(nll), int((targets != IGNORED).sum())
