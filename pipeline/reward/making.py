"""The making of a reward model: what the stages reward and reward_guard share."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from pipeline.checkpoint import StageRun
from pipeline.data.formats import read_rows
from pipeline.distributed import world_size
from pipeline.errors import UserError
from pipeline.fitting import fit, merge_adapter, save_model
from pipeline.lora import quantisation, with_adapter
from pipeline.models import choose_precision, load_causal_lm, load_tokenizer
from pipeline.optim import build_optimizer
from pipeline.reward.constants import sample_replies, score_constants
from pipeline.reward.data import (
    Encoded,
    RankingCollator,
    TrainingRankings,
    encode,
    features,
    read_rankings,
)
from pipeline.reward.held_out import held_out_report, rated_sets
from pipeline.reward.report import pair_accuracy
from pipeline.reward.settings import RewardConfig
from pipeline.reward.summary import card, headline, summarise
from pipeline.reward.training import (
    RankingTrainer,
    add_dropout,
    average_at_first,
    raw_scores,
    reward_model_from,
)
from pipeline.storage import write_json
from pipeline.tokenizer import decode_response, encode_prompt
from pipeline.training import row_order, trainer_arguments


def make_reward_model(config: RewardConfig, stage: StageRun) -> None:
    """Trains, normalises, judges and writes the reward model of a stage, and finishes it."""
    data, sft = stage.parents["data"].path, stage.parents["sft"].path
    tokenizer = load_tokenizer(sft)
    precision = choose_precision(config.training.precision)
    config.training.accumulation(world_size())
    trainer, counts = train(
        config, stage, data=data, sft=sft, tokenizer=tokenizer, bf16=precision == "bf16"
    )
    samples = measure_constants(config, trainer.model, sft=sft, data=data, tokenizer=tokenizer)
    save_model(trainer, stage.path)
    report = held_out_report(
        trainer.model,
        tokenizer=tokenizer,
        data=data,
        split="validation",
        row_type=config.row_type,
        max_length=config.max_length,
        min_gap=config.report_gap,
        seed=config.seed,
    )
    if stage.is_main:
        write_json(stage.path / "report.json", report)
    stage.log_samples(counts["steps"], samples)
    summary = summarise(report, trainer.model.config, counts)
    stage.finish(
        headline(summary),
        chosen={"precision": precision},
        summary=summary,
        card=card(summary, report),
    )


def read_split(
    config: RewardConfig, split: str, *, data: Path, tokenizer: PreTrainedTokenizerFast
) -> Encoded:
    """Returns a split's rankings in tokens.

    Raises:
        UserError: no text fits into max_length.
    """
    encoded = encode(
        read_rankings(data, config.row_type, split=split),
        tokenizer=tokenizer,
        max_length=config.max_length,
    )
    if not encoded.rankings:
        raise UserError(
            f"max_length: no ranking of {split} has two texts of {config.max_length} tokens"
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


def build_model(config: RewardConfig, sft: Path, *, pad_id: int) -> PreTrainedModel:
    """Returns the SFT model's body with a new head.

    Raises:
        UserError: max_length is beyond the model's context.
    """
    model = reward_model_from(
        sft, pad_id=pad_id, seed=config.seed, quantisation=quantisation(config.lora)
    )
    average_at_first(model, layers=config.averaging_layers)
    if config.dropout > 0:
        add_dropout(model, probability=config.dropout)
    context = getattr(model.config, "max_position_embeddings", config.max_length)
    if config.max_length > context:
        raise UserError(
            f"max_length: {config.max_length} is longer than the model's context of {context}"
        )
    return model


def build_trainer(
    config: RewardConfig,
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    bf16: bool,
) -> Trainer:
    """Returns the trainer over the rankings in the order they will be read."""
    training = config.training
    steps = training.num_steps(len(rows))
    order = row_order(
        [0] * len(rows), minibatch_size=training.minibatch_size, steps=steps, seed=config.seed
    )
    arguments = trainer_arguments(
        training, folder=folder, seed=config.seed, steps=steps, world_size=world_size(), bf16=bf16
    )
    trained = with_adapter(model, config.lora, task="SEQ_CLS", seed=config.seed)
    return RankingTrainer(
        model=trained,
        # Processes need different numbers of forward passes, so none of them may synchronise.
        args=TrainingArguments(**arguments, ddp_broadcast_buffers=False),
        train_dataset=TrainingRankings(
            rows=rows,
            order=order,
            token_dropout=config.token_dropout,
            lowercase_frac=config.lowercase_frac,
            seed=config.seed,
        ),
        data_collator=RankingCollator(pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, training), None),
    )


def measure_constants(
    config: RewardConfig,
    model: PreTrainedModel,
    *,
    sft: Path,
    data: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> list[dict[str, Any]]:
    """Returns the SFT model's scored replies after setting reward_mean and reward_std.

    Raises:
        UserError: all replies score the same, so there is nothing to divide by.
    """
    rows = read_rows(data, "prompts", split="train")
    prompts, replies = sample_replies(
        load_causal_lm(sft).to(model.device),
        [encode_prompt(tokenizer, row["prompt"]) for row in rows],
        tokenizer=tokenizer,
        num_samples=config.normalisation.num_samples,
        response_tokens=config.normalisation.response_tokens,
        max_length=config.max_length,
        seed=config.seed,
    )
    pairs = list(zip(prompts, replies, strict=True))
    scores = raw_scores(model, [p + r for p, r in pairs], pad_id=tokenizer.pad_token_id)
    mean, std = score_constants(scores)
    model.config.reward_mean, model.config.reward_std = mean, std
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "response": decode_response(tokenizer, reply),
            "score": (float(score) - mean) / std,
        }
        for (prompt, reply), score in zip(pairs, scores, strict=True)
    ]


def validation_metrics(
    model: PreTrainedModel, encoded: Encoded, *, pad_id: int, min_gap: float
) -> dict[str, float]:
    """Returns held-out pair accuracy of every set and their mean."""
    sets = rated_sets(encoded, scores=raw_scores(model, encoded.texts, pad_id=pad_id))
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
    data: Path,
    sft: Path,
    tokenizer: PreTrainedTokenizerFast,
    bf16: bool,
) -> tuple[Trainer, dict[str, int]]:
    """Returns the trainer after its last step, and how much it was trained on."""
    pad_id = tokenizer.pad_token_id
    training, validation = (
        read_split(config, split, data=data, tokenizer=tokenizer)
        for split in ("train", "validation")
    )
    rows = training_rows(config, training)
    model = build_model(config, sft, pad_id=pad_id)
    trainer = build_trainer(config, model, rows, tokenizer=tokenizer, folder=stage.path, bf16=bf16)
    fit(
        trainer,
        stage,
        validate=lambda: validation_metrics(
            model, validation, pad_id=pad_id, min_gap=config.report_gap
        ),
        eval_every=config.training.eval_every,
        tokens_per_step=sum(map(len, training.texts)) / len(rows) * config.training.minibatch_size,
    )
    merge_adapter(
        trainer,
        stage,
        base=sft,
        load=lambda: reward_model_from(sft, pad_id=pad_id, seed=config.seed),
    )
    return trainer, {
        "steps": trainer.state.global_step,
        "rankings": len(rows),
        "texts": len(training.texts),
        "texts_dropped": training.num_dropped,
        "comparisons": sum(len(row["better"]) for row in rows),
    }
