"""What the stages on Hugging Face's Trainer share: training to the end and saving."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from pipeline.callbacks import FiniteGradients, ResumePoints, RunLogs, Validate, Validation
from pipeline.checkpoint import StageRun
from pipeline.config import require
from pipeline.distributed import barrier, by_deepspeed, on_gpu, world_size
from pipeline.lora import ADAPTER, merged, write_adapter
from pipeline.restricted import DIVIDED_WEIGHTS, restricted, saved_by_deepspeed
from pipeline.saving import saving_of
from pipeline.sharding import PRECISIONS
from pipeline.stopping import keep_pace
from pipeline.training import WORKSPACE, Training

IGNORED = -100
"""Label of a position that does not count."""


def prefer_fast_attention(model: PreTrainedModel | PeftModel, *, bf16: bool) -> None:
    """Chooses attention by plain matrix products where that is faster: in bf16 on a processor.

    There the fused kernel is the slow part (a training step of a 3.3M model, 32 rows of 128
    tokens: 0.33 s against 0.29 s); it saves memory only in rows much longer than ours.
    """
    if bf16 and model.device.type == "cpu" and not on_gpu():
        model.set_attn_implementation("eager")


def fit(
    trainer: Trainer,
    run: StageRun,
    *,
    validate: Validate,
    training: Training,
    tokens_per_step: float,
) -> float:
    """Returns tokens per second after training to the last step, from the newest resume point.

    Args:
        trainer: built from `pipeline.training.trainer_arguments`.
        run: the stage's folder; receives metrics, timings and resume points.
        validate: returns the validation figures of the model as it is.
        training: how often to log and to validate.
        tokens_per_step: tokens of one optimizer step over all processes, for the throughput.

    Raises:
        UserError: a loss or gradient is not finite, the disk has no room for what is coming, or the
            resume point is of models held otherwise.
        Stopped: a signal or the deadline ended it; a resume point is written.
    """
    require(
        trainer.is_deepspeed_enabled == by_deepspeed(),
        "DeepSpeed was asked for, and accelerate leaves it out. Unset ACCELERATE_USE_CPU, or use "
        "configs/accelerate/ddp.yaml",
    )
    run.require_space(_bytes_of(trainer.model, trained=True), _bytes_of(trainer.model))
    prefer_fast_attention(trainer.model, bf16=trainer.args.bf16)
    done, folder = run.latest_point() or (0, None)
    if folder:
        check_division(folder, now=_division_of(trainer))
    add_in_float32(trainer)
    with keep_pace(saving_of(run.config), stage=run.stage) as pace:
        logs = RunLogs(run, every=training.log_every, tokens_per_step=tokens_per_step)
        if folder:
            logs.load(folder)
        _follow_contract(
            trainer,
            [
                FiniteGradients(),
                logs,
                Validation(run, validate, every=training.eval_every),
                ResumePoints(run, pace=pace, logs=logs),
            ],
        )
        started = time.monotonic()
        try:
            with restricted(folder):
                trainer.train(resume_from_checkpoint=folder and str(folder))
            seconds = time.monotonic() - started
            barrier()  # Trainer's last look is into the folder that goes now
        finally:
            if run.is_main:
                shutil.rmtree(run.path / WORKSPACE, ignore_errors=True)
    unset_hf_deepspeed_config()  # what is loaded from now on is this process's own, and whole
    if pace.was_asked():
        run.stop(trainer.state.global_step, pace.asked_by)
    return (trainer.state.global_step - done) * tokens_per_step / seconds


def add_in_float32(trainer: Trainer) -> None:
    """Has a model that Accelerate divides read in bfloat16 as ppo reads one.

    Accelerate's own setting would add gradients over the processes in bfloat16, and round losses.
    """
    if trainer.args.bf16 and trainer.accelerator.is_fsdp2:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = PRECISIONS["bf16"]


def _division_of(trainer: Trainer) -> str:
    """Returns how a trainer holds its model and optimizer, in words."""
    if trainer.is_deepspeed_enabled:
        return f"divided by DeepSpeed over {world_size()} processes"
    return "divided by FSDP" if trainer.is_fsdp_enabled else "whole"


def check_division(point: Path, *, now: str) -> None:
    """Raises UserError where a resume point holds models otherwise than the trainer does now.

    It could not read the point, or would lose the optimizer's state.
    """
    saved = saved_by_deepspeed(point)
    made = "divided by FSDP" if (point / DIVIDED_WEIGHTS).is_file() else "whole"
    made = f"divided by DeepSpeed over {saved} processes" if saved else made
    require(
        made == now,
        f"{point} holds models {made}, and now they are {now}. Go on with the ACCELERATE_CONFIG "
        "and NPROC that it was made with, or add FORCE=1 to begin anew",
    )


def _follow_contract(trainer: Trainer, callbacks: list[TrainerCallback]) -> None:
    """Puts our logs, checks and resume points in the place of Trainer's printing."""
    transformers_logging.disable_progress_bar()
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    for callback in callbacks:
        trainer.add_callback(callback)


def _bytes_of(model: nn.Module, *, trained: bool = False) -> int:
    """Returns the size of all weights, or of those that are trained."""
    return sum(
        p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained
    )


def merge_adapter(trainer: Trainer, run: StageRun, *, base: Path, quantised: bool) -> None:
    """Writes a trained adapter to adapter/ and merges it into the weights where they are.

    Weights in 4 bits stay as they are, with the adapter on them, until `save_merged` writes ones of
    full precision. Where all weights were trained there is nothing to do.

    Args:
        trainer: at its end.
        run: whose folder gets the adapter.
        base: folder of the model that the adapter was trained on.
        quantised: whether its weights are in 4 bits.
    """
    model = trainer.model
    if not isinstance(model, PeftModel):
        return
    if run.is_main:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        write_adapter(run.path / ADAPTER, model.peft_config["default"], weights, base=base)
    barrier()
    trainer.model = model.eval() if quantised else model.merge_and_unload().eval()


def save_merged(trainer: Trainer, folder: Path, *, load: Callable[[], PreTrainedModel]) -> None:
    """Writes the model like `save_model`, without an adapter that 4-bit weights still have.

    Args:
        trainer: after `merge_adapter`.
        folder: of the stage, with the adapter.
        load: returns the model that the adapter was trained on in full precision, in the main
            process's own memory; none other loads it.
    """
    if not isinstance(trainer.model, PeftModel):
        save_model(trainer, folder)
    elif trainer.args.should_save:
        merged(load(), folder / ADAPTER).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)


def save_model(trainer: Trainer, folder: Path) -> None:
    """Writes weights, configuration and tokenizer as a plain Hugging Face folder."""
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)
