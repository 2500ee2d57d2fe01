"""The making of a reward model: what the stages reward and reward_guard share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments

from pipeline.checkpoint import StageRun
from pipeline.data.formats import read_rows
from pipeline.distributed import world_size
from pipeline.errors import UserError, told
from pipeline.fitting import fit, merge_adapter, save_merged
from pipeline.lora import quantisation, with_adapter
from pipeline.models import load_causal_lm, load_tokenizer, take_constants
from pipeline.optim import build_optimizer, given
from pipeline.origin import origin_commit
from pipeline.pretrained import from_pretrained
from pipeline.reward.constants import sample_replies, set_constants
from pipeline.reward.data import (
    Encoded,
    RankingCollator,
    TrainingRankings,
    encode,
    features,
    mean_padding_frac,
    read_rankings,
)
from pipeline.reward.held_out import Trained, held_out_report, rated_sets
from pipeline.reward.reading import Reading, TokenReading, Words, limit_of, load_reading
from pipeline.reward.report import pair_accuracy
from pipeline.reward.scores import raw_scores
from pipeline.reward.settings import RewardConfig
from pipeline.reward.summary import card, headline, summarise
from pipeline.reward.training import (
    RankingTrainer,
    add_dropout,
    check_packing,
    reward_model_from,
)
from pipeline.storage import write_json
from pipeline.tokenizer import encode_prompt
from pipeline.training import on_one_gpu, row_order, trainer_arguments


def make_reward_model(config: RewardConfig, stage: StageRun, *, device: Any) -> None:
    """Trains, normalises, judges and writes the reward model of a stage, and finishes it.

    The SFT model replies at first, so that it is gone when the reward model is trained.
    """
    config = stage.resolved(config)
    data, sft = stage.parents["data"].path, stage.parents["sft"].path
    tokenizer = load_tokenizer(sft)
    reading: Reading = TokenReading(tokenizer)
    if config.init_from:
        reading = load_reading(config.init_from)
    check_length(config, sft, reading=reading)
    config.training.accumulation(world_size())
    encoded = {
        split: read_split(config, split, data=data, reading=reading)
        for split in ("train", "validation")
    }
    rows = training_rows(config, encoded["train"])
    texts = [row["prompt"] for row in read_rows(data, "prompts", split="train")]
    tokens = [encode_prompt(tokenizer, text) for text in texts]
    prompts, replies = sample_replies(
        load_causal_lm(sft, quantisation=quantisation(config.lora.quantise)).to(device),
        tokens,
        tokenizer=tokenizer,
        normalisation=config.normalisation,
        max_length=config.max_length,
        seed=config.seed,
    )
    trainer, counts = train(
        config,
        stage,
        encoded=encoded,
        rows=rows,
        sft=sft,
        reading=reading,
    )
    words = Words.behind(tokens, texts, tokenizer=tokenizer)
    samples = set_constants(trainer.model, prompts, replies, words=words, reading=reading)
    save_merged(trainer, stage.path, load=lambda: untrained(config, sft, like=trainer.model))
    report = held_out_report(
        trainer.model,
        reading=reading,
        data=data,
        split="validation",
        trained=Trained.of(config.content()),
        seed=config.seed,
    )
    if stage.is_main:
        write_json(stage.path / "report.json", report)
    stage.log_samples(trainer.state.global_step, samples)
    summary = summarise(report, trainer.model.config, counts)
    stage.finish(
        headline(summary),
        chosen={**stage.points.chosen, **origin_commit(config.init_from)},
        summary=summary,
        card=card(summary, report),
    )


def check_length(config: RewardConfig, sft: Path, *, reading: Reading) -> None:
    """Raises UserError where max_length is beyond the context of the model to train.

    Of the model only its configuration is read.
    """
    path = config.init_from or sft
    with told(f"{path}: no model could be loaded from there"):
        begun = from_pretrained(AutoConfig, path, weights=False)
    context = limit_of(begun, reading.tokenizer)
    if config.max_length > context:
        raise UserError(
            f"max_length: {config.max_length} is longer than the model's context of {context}"
        )


def read_split(config: RewardConfig, split: str, *, data: Path, reading: Reading) -> Encoded:
    """Returns a split's rankings in tokens.

    Raises:
        UserError: no text fits into max_length.
    """
    encoded = encode(
        read_rankings(data, config.row_type, split=split),
        reading=reading,
        max_length=config.max_length,
    )
    if not encoded.rankings:
        raise UserError(
            f"max_length: no ranking of {split} has two texts of {config.max_length} tokens; "
            "raise it, or shorten prompts and replies"
        )
    return encoded


def training_rows(config: RewardConfig, encoded: Encoded) -> list[dict[str, Any]]:
    """Returns one row per ranking that holds a comparison.

    Raises:
        UserError: none does.
    """
    rows = features(encoded, min_gap=config.min_gap, soft=config.labels == "raters")
    if not rows:
        raise UserError(f"min_gap: no two texts of a training ranking differ by {config.min_gap}")
    return rows


def build_model(config: RewardConfig, sft: Path, *, reading: Reading) -> PreTrainedModel:
    """Returns the body of init_from, or of the SFT model, with a new head.

    Raises:
        UserError: the architecture has no list of layers for dropout, or reads no packed texts.
    """
    model = reward_model_from(
        config.init_from or sft,
        pad_id=reading.tokenizer.pad_token_id,
        seed=config.seed,
        quantisation=quantisation(config.lora.quantise),
    )
    if config.pack and not config.init_from:
        check_packing(model)
    if config.dropout > 0:
        add_dropout(model, probability=config.dropout)
    return model


def build_trainer(
    config: RewardConfig,
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    *,
    reading: Reading,
    folder: Path,
) -> Trainer:
    """Returns the trainer over the rankings in the order they will be read."""
    training = config.training
    steps = training.num_steps(len(rows))
    order = row_order(
        [0] * len(rows), minibatch_size=training.minibatch_size, steps=steps, seed=config.seed
    )
    arguments = trainer_arguments(
        training,
        folder=folder,
        seed=config.seed,
        steps=steps,
        world_size=world_size(),
        recomputes=config.activation_checkpointing,
    )
    trained = with_adapter(model, config.lora, task="SEQ_CLS", seed=config.seed)
    trainer = RankingTrainer(
        model=trained,
        # Texts that are not packed take processes different numbers of forward passes, so none of
        # these may synchronise.
        args=on_one_gpu(TrainingArguments(**arguments, ddp_broadcast_buffers=False)),
        train_dataset=TrainingRankings(
            rows=rows,
            order=order,
            token_dropout=config.token_dropout,
            lowercase_frac=config.lowercase_frac,
            seed=config.seed,
        ),
        data_collator=RankingCollator(
            pad_id=reading.tokenizer.pad_token_id,
            packed=config.pack and not config.init_from,
            separator=reading.separator,
        ),
        processing_class=reading.tokenizer,
    )
    return given(trainer, build_optimizer(model, training))


def untrained(config: RewardConfig, sft: Path, *, like: PreTrainedModel) -> PreTrainedModel:
    """Returns the model that training began with, in full precision, with another's constants."""
    origin, pad_id = config.init_from or sft, like.config.pad_token_id
    model = reward_model_from(origin, pad_id=pad_id, seed=config.seed)
    take_constants(model, like.config)
    return model


def validation_metrics(
    model: PreTrainedModel, encoded: Encoded, *, reading: Reading, min_gap: float
) -> dict[str, float]:
    """Returns held-out pair accuracy of every set and their mean."""
    pad_id, separator = reading.tokenizer.pad_token_id, reading.separator
    scores = raw_scores(model, encoded.texts, pad_id=pad_id, separator=separator)
    sets = rated_sets(encoded, scores=scores)
    found = {name: pair_accuracy(rated, min_gap=min_gap) for name, rated in sets.items()}
    known = {name: value for name, value in found.items() if value is not None}
    metrics = {f"validation/accuracy_{name}": value for name, value in known.items()}
    if known:
        metrics["validation/accuracy"] = sum(known.values()) / len(known)
    return metrics


def train(
    config: RewardConfig,
    stage: StageRun,
    *,
    encoded: Mapping[str, Encoded],
    rows: list[dict[str, Any]],
    sft: Path,
    reading: Reading,
) -> tuple[Trainer, dict[str, int | float]]:
    """Returns the trainer after its last step, and how much it was trained on.

    Args:
        config: of the stage.
        stage: its folder.
        encoded: rankings of train and validation in tokens.
        rows: those of train that are trained on.
        sft: folder of the SFT model.
        reading: how the model reads text.
    """
    training, validation = encoded["train"], encoded["validation"]
    model = build_model(config, sft, reading=reading)
    trainer = build_trainer(config, model, rows, reading=reading, folder=stage.path)
    fit(
        trainer,
        stage,
        validate=lambda: validation_metrics(
            model, validation, reading=reading, min_gap=config.report_gap
        ),
        training=config.training,
        tokens_per_step=sum(map(len, training.texts)) / len(rows) * config.training.minibatch_size,
    )
    base, quantised = Path(config.init_from or sft), config.lora.quantise != "none"
    merge_adapter(trainer, stage, base=base, quantised=quantised)
    packs = config.pack and not config.init_from
    return trainer, {
        "steps": trainer.state.global_step,
        **({"padding_frac": mean_padding_frac(rows)} if packs else {}),
        "rankings": len(rows),
        "texts": len(training.texts),
        "texts_dropped": training.num_dropped,
        "comparisons": sum(len(row["better"]) for row in rows),
    }
