"""Train the reward model: Bradley-Terry over every comparison of rated replies.

Reads   runs/<recipe>/data (preferences and prompts rows) and runs/<recipe>/sft
Writes  runs/<recipe>/reward, a sequence classifier with one label whose config.json holds
        reward_mean and reward_std; report.json on the validation texts; samples.jsonl
Command make reward RECIPE=cpu ARGS="--training.epochs=2"
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import StageRun, begin, open_artifact
from pipeline.command import command
from pipeline.config import StageConfig, require
from pipeline.data.formats import read_rows
from pipeline.distributed import setup, world_size
from pipeline.errors import UserError
from pipeline.storage import write_json
from pipeline.training import Training, row_order, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

    from pipeline.reward.data import Encoded


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Constants that bring the scores of the SFT model's own replies to mean 0 and deviation 1."""

    num_samples: int = 512
    """Replies of the SFT model, each to another training prompt (fewer prompts repeat)."""
    response_tokens: int = 32
    """Longest reply in tokens; the same as in ppo."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "response_tokens"):
            value = getattr(self, name)
            require(value >= 2, f"normalisation.{name}: must be at least 2, got {value}")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Settings of the reward stage; a training row is a ranking, and a pair is a ranking of two."""

    row_type: str = "preferences"
    """Rows that are trained on: preferences or guard_preferences."""
    max_length: int = 128
    """Longest prompt and response together in tokens; longer texts are left out and counted."""
    min_gap: float = 0.25
    """Two texts of a ranking are compared when their mean ratings differ by at least this much."""
    labels: str = "hard"
    """hard: the better text wins; raters: with the probability that one rater prefers it."""
    dropout: float = 0.0
    """Dropout in front of every layer, in training only."""
    token_dropout: float = 0.0
    """Share of the response tokens that are left out at random, others in every pass."""
    lowercase_frac: float = 0.0
    """Share of the responses that are read in lower case, others in every pass."""
    texts_per_forward: int = 16
    """Texts of one forward pass; a ranking is cut in the order of length, so that little pads."""
    report_gap: float = 0.5
    """Least difference of mean ratings of the pairs that held-out accuracy counts."""
    normalisation: Normalisation = field(default_factory=Normalisation)
    """Constants written into the model's configuration."""
    training: Training = field(default_factory=Training)
    """How the weights are moved; its rows are rankings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row_types = ("preferences", "guard_preferences")
        require(
            self.row_type in row_types,
            f"row_type: must be {' or '.join(row_types)}, got {self.row_type!r}",
        )
        require(
            self.labels in ("hard", "raters"),
            f"labels: must be hard or raters, got {self.labels!r}",
        )
        for name in ("max_length", "texts_per_forward"):
            value = getattr(self, name)
            require(value >= 1, f"{name}: must be at least 1, got {value}")
        for name in ("dropout", "token_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}: must be in [0, 1), got {value}")
        require(
            0 <= self.lowercase_frac <= 1,
            f"lowercase_frac: must be in [0, 1], got {self.lowercase_frac}",
        )
        for name in ("min_gap", "report_gap"):
            value = getattr(self, name)
            require(value >= 0, f"{name}: must be at least 0, got {value}")


def read_split(
    config: Config, split: str, *, data: Path, tokenizer: "PreTrainedTokenizerFast"
) -> "Encoded":
    """Returns a split's rankings in tokens.

    Raises:
        UserError: no text fits into max_length.
    """
    from pipeline.reward.data import encode, read_rankings

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


def training_rows(config: Config, encoded: "Encoded") -> list[dict[str, Any]]:
    """Returns one row per ranking that holds a comparison.

    Raises:
        UserError: none does.
    """
    from pipeline.reward.data import features

    rows = features(encoded, min_gap=config.min_gap, soft=config.labels == "raters")
    if not rows:
        raise UserError(f"min_gap: no two texts of a training ranking differ by {config.min_gap}")
    return rows


def build_model(config: Config, sft: Path, *, pad_id: int) -> "PreTrainedModel":
    """Returns the SFT model's body with a new head.

    Raises:
        UserError: max_length is beyond the model's context.
    """
    from pipeline.reward.training import add_dropout, reward_model_from

    model = reward_model_from(sft, pad_id=pad_id, seed=config.seed)
    if config.dropout > 0:
        add_dropout(model, probability=config.dropout)
    context = getattr(model.config, "max_position_embeddings", config.max_length)
    if config.max_length > context:
        raise UserError(
            f"max_length: {config.max_length} is longer than the model's context of {context}"
        )
    return model


def build_trainer(
    config: Config,
    model: "PreTrainedModel",
    rows: list[dict[str, Any]],
    *,
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
    bf16: bool,
) -> "Trainer":
    """Returns the trainer over the rankings in the order they will be read."""
    from transformers import TrainingArguments

    from pipeline.optim import build_optimizer
    from pipeline.reward.data import RankingCollator, TrainingRankings
    from pipeline.reward.training import RankingTrainer

    training = config.training
    steps = training.num_steps(len(rows))
    order = row_order(
        [0] * len(rows), minibatch_size=training.minibatch_size, steps=steps, seed=config.seed
    )
    arguments = trainer_arguments(
        training, folder=folder, seed=config.seed, steps=steps, world_size=world_size(), bf16=bf16
    )
    return RankingTrainer(
        model=model,
        # Processes need different numbers of forward passes, so none of them may synchronise.
        args=TrainingArguments(**arguments, ddp_broadcast_buffers=False),
        train_dataset=TrainingRankings(
            rows=rows,
            order=order,
            token_dropout=config.token_dropout,
            lowercase_frac=config.lowercase_frac,
            seed=config.seed,
        ),
        data_collator=RankingCollator(
            pad_id=tokenizer.pad_token_id, texts_per_forward=config.texts_per_forward
        ),
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, training), None),
    )


def measure_constants(
    config: Config,
    model: "PreTrainedModel",
    *,
    sft: Path,
    data: Path,
    tokenizer: "PreTrainedTokenizerFast",
) -> list[dict[str, Any]]:
    """Returns the SFT model's scored replies after setting reward_mean and reward_std.

    Raises:
        UserError: all replies score the same, so there is nothing to divide by.
    """
    from pipeline.models import load_causal_lm
    from pipeline.reward.constants import sample_replies, score_constants
    from pipeline.reward.training import raw_scores
    from pipeline.tokenizer import decode_response, encode_prompt

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
    model: "PreTrainedModel", encoded: "Encoded", *, pad_id: int, min_gap: float
) -> dict[str, float]:
    """Returns held-out pair accuracy of every set and their mean."""
    from pipeline.reward.held_out import rated_sets
    from pipeline.reward.report import pair_accuracy
    from pipeline.reward.training import raw_scores

    sets = rated_sets(encoded, scores=raw_scores(model, encoded.texts, pad_id=pad_id))
    found = {name: pair_accuracy(rated, min_gap=min_gap) for name, rated in sets.items()}
    known = {name: value for name, value in found.items() if value is not None}
    metrics = {f"validation/accuracy_{name}": value for name, value in known.items()}
    if known:
        metrics["validation/accuracy"] = sum(known.values()) / len(known)
    return metrics


def train(
    config: Config,
    stage: StageRun,
    *,
    data: Path,
    sft: Path,
    tokenizer: "PreTrainedTokenizerFast",
    bf16: bool,
) -> tuple["Trainer", dict[str, int]]:
    """Returns the trainer after its last step, and how much it was trained on."""
    from pipeline.fitting import fit

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
    return trainer, {
        "steps": trainer.state.global_step,
        "rankings": len(rows),
        "texts": len(training.texts),
        "texts_dropped": training.num_dropped,
        "comparisons": sum(len(row["better"]) for row in rows),
    }


def run(config: Config) -> None:
    """Makes the reward folder."""
    setup(config)
    data = open_artifact(config.folder("data"), kind="dataset")
    sft = open_artifact(config.folder("sft"), kind="causal-lm")
    with begin(config, stage="reward", kind="reward", parents={"data": data, "sft": sft}) as stage:
        from pipeline.fitting import save_model
        from pipeline.models import choose_precision, load_tokenizer
        from pipeline.reward.held_out import held_out_report
        from pipeline.reward.summary import card, headline, summarise

        tokenizer = load_tokenizer(sft.path)
        precision = choose_precision(config.training.precision)
        config.training.accumulation(world_size())
        paths = {"data": data.path, "sft": sft.path}
        trainer, counts = train(
            config, stage, **paths, tokenizer=tokenizer, bf16=precision == "bf16"
        )
        samples = measure_constants(config, trainer.model, **paths, tokenizer=tokenizer)
        save_model(trainer, stage.path)
        report = held_out_report(
            trainer.model,
            tokenizer=tokenizer,
            data=data.path,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="reward")


if __name__ == "__main__":
    raise SystemExit(main())
