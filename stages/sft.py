"""Instruction tuning: train the pretrained model on replies only, with TRL's SFTTrainer.

Reads   runs/<recipe>/data (instructions rows) and runs/<recipe>/pretrain
Writes  runs/<recipe>/sft, a Hugging Face model folder with its tokenizer; adapter/ where lora.rank
        is set; samples.jsonl
Command make sft RECIPE=cpu ARGS="--training.steps=200"
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import StageRun, begin, open_artifact
from pipeline.command import command
from pipeline.config import require
from pipeline.context import context_of, fits
from pipeline.distributed import setup, world_size
from pipeline.errors import UserError
from pipeline.instructions import IGNORED, Example, Examples, collate, read_examples
from pipeline.lora import LoRA, quantisation, with_adapter
from pipeline.saving import TrainingConfig
from pipeline.spacing import evenly_spaced
from pipeline.streams import stream
from pipeline.training import (
    Training,
    on_one_gpu,
    padding_frac,
    row_order,
    trainer_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl import SFTTrainer


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Settings of the sft stage."""

    max_length: int = 128
    """Longest row in tokens, prompt and reply; longer ones are dropped and counted."""
    eval_rows: int = 512
    """Validation rows, evenly spaced, read while training; the final figures read all of them."""
    samples: int = 8
    """Replies to validation prompts written to samples.jsonl."""
    sample_tokens: int = 48
    """Most tokens of such a reply; fewer where the longest of the prompts leaves less of the
    model's context."""
    training: Training = field(default_factory=Training)
    """How the weights are moved."""
    lora: LoRA = field(default_factory=LoRA)
    """Adapters that are trained in place of all weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_rows", "sample_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"{name}: must be at least 1, got {value}")
        require(self.max_length >= 2, f"max_length: must be at least 2, got {self.max_length}")
        require(self.samples >= 0, f"samples: must be at least 0, got {self.samples}")


def load_model(config: Config, path: Path) -> "PreTrainedModel":
    """Returns the pretrained model, once its context holds the longest row."""
    from pipeline.models import load_causal_lm

    model = load_causal_lm(path, quantisation=quantisation(config.lora.quantise))
    if not fits(model.config, config.max_length):
        raise UserError(
            f"max_length: {config.max_length} is longer than the context of "
            f"{context_of(model.config)} positions of the model in {path}"
        )
    return model


def build_trainer(
    config: Config,
    model: "PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerFast",
    ordered: Sequence[Example],
    run: StageRun,
) -> "SFTTrainer":
    """Returns TRL's trainer over rows that are tokenised, masked and in reading order.

    Its loss is ours, which is the same: TRL's chunked head, made for GPUs, takes three times as
    long as a plain one on a processor (python -m benchmarks.language_loss).
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from pipeline.language_loss import LanguageModelTrainer
    from pipeline.optim import build_optimizer, given

    class ReplyTrainer(LanguageModelTrainer, SFTTrainer):
        """TRL's trainer with the loss that never holds a batch's logits."""

    arguments = trainer_arguments(
        config.training,
        folder=run.path,
        seed=config.seed,
        steps=len(ordered) // config.training.minibatch_size,
        world_size=world_size(),
        recomputes=config.activation_checkpointing,
    )
    trained = with_adapter(model, config.lora, task="CAUSAL_LM", seed=config.seed)
    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = ReplyTrainer(
        language_model=model,
        model=trained,
        args=on_one_gpu(SFTConfig(**arguments, **prepared)),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [row.input_ids for row in ordered],
                "labels": [row.labels for row in ordered],
            }
        ),
        processing_class=tokenizer,
    )
    return given(trainer, build_optimizer(model, config.training))


def validation_metrics(
    model: "PreTrainedModel", rows: Sequence[Example], *, pad_id: int, batch_size: int
) -> dict[str, float]:
    """Returns loss (nats per reply token, EOS included) and perplexity."""
    from pipeline.language_loss import mean_nll
    from pipeline.logprobs import perplexity

    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    batches = [
        collate([vars(row) for row in ordered[i : i + batch_size]], pad_id=pad_id)
        for i in range(0, len(ordered), batch_size)
    ]
    loss, _ = mean_nll(model, batches)
    return {"validation/loss": loss, "validation/perplexity": perplexity(loss)}


def write_samples(
    config: Config,
    model: "PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerFast",
    rows: Sequence[Example],
    run: StageRun,
    step: int,
) -> None:
    """Writes sampled replies (temperature 1) to a few validation prompts beside people's."""
    from pipeline.models import load_causal_lm
    from pipeline.ppo.rollout import generate, uniforms
    from pipeline.sharding import is_in_parts
    from pipeline.tokenizer import decode_response

    chosen = [rows[index] for index in evenly_spaced(len(rows), config.samples)]
    if not chosen or not run.is_main:
        return
    if is_in_parts(model):  # this process alone samples, from what was just written; not on its
        model = load_causal_lm(run.path)  # GPU, which holds a part of the model already
    prompts = [_prompt_of(row) for row in chosen]
    context, longest = context_of(model.config), max(map(len, prompts))
    room = context - longest if context else config.sample_tokens
    numbers = uniforms(
        stream(config.seed, "samples"),
        update=0,
        rows=list(range(len(chosen))),
        positions=min(config.sample_tokens, room),
    )
    replies = generate(
        model.eval(),
        prompts,
        uniforms=numbers,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    run.log_samples(
        step,
        [
            {
                "prompt": tokenizer.decode(prompt),
                "response": decode_response(tokenizer, reply),
                "human": decode_response(tokenizer, row.input_ids[len(prompt) :]),
            }
            for prompt, reply, row in zip(prompts, replies.responses, chosen, strict=True)
        ],
    )


def _prompt_of(row: Example) -> list[int]:
    """Returns the tokens before the first one that is learned."""
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:first]


def in_reading_order(config: Config, train: Examples) -> list[Example]:
    """Returns every row that training will read, grouped by length to save padding."""
    training = config.training
    order = row_order(
        train.lengths,
        minibatch_size=training.minibatch_size,
        steps=training.num_steps(len(train.rows)),
        seed=config.seed,
    )
    return [train.rows[row] for row in order]


def _num_tokens(rows: Sequence[Example]) -> int:
    return sum(len(row.input_ids) for row in rows)


def train_and_validate(
    config: Config,
    trainer: "SFTTrainer",
    *,
    ordered: Sequence[Example],
    validation: Sequence[Example],
    run: StageRun,
) -> tuple[float, dict[str, float]]:
    """Returns tokens per second and the final validation figures; the folder holds the model."""
    from pipeline.fitting import fit, merge_adapter, save_merged
    from pipeline.models import load_causal_lm

    tokenizer = trainer.processing_class

    def validate(num_rows: int) -> dict[str, float]:
        return validation_metrics(
            trainer.model,
            [validation[index] for index in evenly_spaced(len(validation), num_rows)],
            pad_id=tokenizer.pad_token_id,
            batch_size=config.training.microbatch_size,
        )

    speed = fit(
        trainer,
        run,
        validate=lambda: validate(config.eval_rows),
        training=config.training,
        tokens_per_step=_num_tokens(ordered) / trainer.args.max_steps,
    )
    base = run.parents["pretrain"].path
    merge_adapter(trainer, run, base=base, quantised=config.lora.quantise != "none")
    step = trainer.state.global_step
    final = validate(len(validation))
    run.log(step, final)
    save_merged(trainer, run.path, load=lambda: load_causal_lm(base))
    write_samples(config, trainer.model, tokenizer=tokenizer, rows=validation, run=run, step=step)
    return speed, final


def summarise(
    config: Config,
    *,
    train: Examples,
    ordered: Sequence[Example],
    final: Mapping[str, float],
    speed: float,
) -> dict[str, int | float]:
    """Returns the headline figures."""
    lengths = [len(row.input_ids) for row in ordered]
    return {
        **{name.split("/")[1]: value for name, value in final.items()},
        "padding_frac": padding_frac(lengths, microbatch_size=config.training.microbatch_size),
        "tokens_per_second": speed,
        "steps": len(ordered) // config.training.minibatch_size,
        "tokens_seen": sum(lengths),
        "reply_tokens_seen": sum(label != IGNORED for row in ordered for label in row.labels),
        "rows": len(train.rows),
        "rows_dropped": train.num_dropped,
        "epochs": len(ordered) / len(train.rows),
    }


def headline(summary: Mapping[str, int | float]) -> str:
    """Returns the stage's result in a few words."""
    return (
        f"validation loss {summary['loss']:.3f} on replies, perplexity "
        f"{summary['perplexity']:.1f}, {summary['padding_frac']:.1%} padding, "
        f"{summary['tokens_per_second']:,.0f} tokens/s"
    )


def card(summary: Mapping[str, int | float], train: Examples) -> str:
    """Returns the folder's model card."""
    return f"""# Instruction-tuned model

{summary["steps"]} steps from `pretrain`, {summary["epochs"]:.2f} passes over
{len(train.rows):,} prompts with replies ({train.num_dropped} too long and dropped). The loss
counts the assistant's tokens and their EOS only. Rows of a minibatch have similar lengths, so
that {summary["padding_frac"]:.1%} of the positions are padding.

| figure, on validation replies | value |
|---|---|
| loss, nats per token | {summary["loss"]:.4f} |
| perplexity | {summary["perplexity"]:.2f} |

`samples.jsonl` holds replies to validation prompts at temperature 1.
"""


def run(config: Config) -> None:
    """Makes the sft folder."""
    setup(config, divides="nobody" if config.lora.rank else "accelerate")
    data = open_artifact(config.folder("data"), kind="dataset")
    pretrain = open_artifact(config.folder("pretrain"), kind="causal-lm")
    parents = {"data": data, "pretrain": pretrain}
    with begin(config, stage="sft", kind="causal-lm", parents=parents) as stage_run:
        from pipeline.models import load_tokenizer

        config = stage_run.resolved(config)
        config.training.accumulation(world_size())
        tokenizer = load_tokenizer(pretrain.path)
        train, validation = (
            read_examples(
                data.path / f"instructions-{split}.parquet",
                tokenizer=tokenizer,
                max_length=config.max_length,
            )
            for split in ("train", "validation")
        )
        ordered = in_reading_order(config, train)
        model = load_model(config, pretrain.path)
        trainer = build_trainer(
            config,
            model,
            tokenizer=tokenizer,
            ordered=ordered,
            run=stage_run,
        )
        speed, final = train_and_validate(
            config, trainer, ordered=ordered, validation=validation.rows, run=stage_run
        )
        summary = summarise(config, train=train, ordered=ordered, final=final, speed=speed)
        stage_run.finish(
            headline(summary),
            chosen=stage_run.points.chosen,
            summary=summary,
            card=card(summary, train),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="sft")


if __name__ == "__main__":
    raise SystemExit(main())
