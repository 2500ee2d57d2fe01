"""Aligns the SFT model with the reward model by PPO under a KL penalty.

Reads   runs/<recipe>/{data,sft,reward}, with a guard also reward_guard, with reward.sources what
        they name (reward then only if named); of the data the prompts of the training and
        validation splits, and the pretraining text (validation: the alignment tax; training:
        PPO-ptx).
Writes  runs/<recipe>/ppo: the policy as a Hugging Face model folder with its tokenizer, adapter/
        (where roles is lora), value/ (the critic, if advantages need one), best/ (where a guard
        chose one), rollouts/ (some, token by token), metrics, timings and samples of every
        validation.
Run     make ppo RECIPE=cpu ARGS="--kl.coef=0.1"
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import Artifact, StageRun, begin, open_artifact
from pipeline.command import command
from pipeline.config import require
from pipeline.distributed import setup, sharding_of, world_size
from pipeline.lora import LoRA
from pipeline.ppo.diagnosis import Diagnoser
from pipeline.ppo.engine_settings import Engine, check_engine
from pipeline.ppo.guard import Guard, Watch
from pipeline.ppo.keep import keep_models, keep_rollout
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.ppo.sources import Loader, open_source, outside_sources
from pipeline.ppo.wanted import ATTENTION, SHARDING, Wanted, check_roles, check_sharding
from pipeline.progress import progress
from pipeline.saving import Saving, TrainingConfig
from pipeline.stopping import keep_pace
from pipeline.storage import read_jsonl
from pipeline.training import PRECISIONS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipeline.ppo.trainer import PPOTrainer
    from pipeline.ppo.validation import Validation

log = logging.getLogger(__name__)

PARENTS = {"data": "dataset", "sft": "causal-lm"}
GUARD = "reward_guard"


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Settings of the ppo stage."""

    updates: int = 60
    """Updates: one rollout and its optimisation each."""
    prompts_per_update: int = 128
    """Responses of one rollout, over all processes; each has a prompt of its own unless
    advantage.responses_per_prompt says otherwise."""
    minibatch_size: int = 32
    """Responses of one optimizer step, over all processes; divides prompts_per_update."""
    microbatch_size: int = 32
    """Responses of one forward and backward pass of one process."""
    max_prompt_tokens: int = 64
    """Prompts with more tokens than this are dropped and counted."""
    max_response_tokens: int = 32
    """Token budget of a response, EOS included."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    precision: str = "fp32"
    """fp32, bf16 (autocast), or auto: bf16 where the processor computes it natively."""
    attention: str = "auto"
    """Precision of attention and of the cache that decoding reads, where a processor computes in
    bf16: fp32, mixed (attends in fp32 to a cache in bf16), bf16, or auto: the fastest in a
    measurement when the stage begins."""
    workers: int = 0
    """Passes of a process side by side, which share its threads; 0: two on a processor with two
    threads or more. On a GPU and with divided weights always one. It changes rounding only."""
    sharding: str = "auto"
    """How the processes hold the models: none (whole), fsdp2 (each its part), fsdp2_offload (in the
    processor's memory between passes); auto: as the YAML says. It changes rounding only."""
    kl: KL = field(default_factory=KL)
    """The KL penalty."""
    reward: Reward = field(default_factory=Reward)
    """Scores and rewards."""
    advantage: Advantage = field(default_factory=Advantage)
    """What a response is held against."""
    optimisation: Optimisation = field(default_factory=Optimisation)
    """Losses and steps of one update."""
    engine: Engine = field(default_factory=Engine)
    """What samples the responses."""
    roles: str = "separate"
    """separate: four models; trunk: the critic is a head on the policy's last hidden state; lora:
    all roles are adapters on the frozen SFT model."""
    lora: LoRA = field(default_factory=LoRA)
    """The policy's adapter, where roles is lora; the others are the reward stage's."""
    validate_every: int = 10
    """Updates between two looks at the validation prompts."""
    validation_prompts: int = 256
    """Validation prompts, evenly spaced: the same, with the same uniform numbers, at every look."""
    guard: Guard = field(default_factory=Guard)
    """A second reward model that watches for over-optimisation."""
    keep_rollout_every: int = 0
    """Looks at validation between two rollouts kept for the report, token by token; 0: none."""
    saving: Saving = field(default_factory=lambda: Saving(every=10))
    """Resume points, by updates, and how the stage stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "updates", "prompts_per_update", "minibatch_size", "microbatch_size", "temperature",
            "max_prompt_tokens", "max_response_tokens", "validate_every", "validation_prompts",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            require(value > 0, f"{name}: must be positive, got {value}")
        for name in ("keep_rollout_every", "workers"):
            value = getattr(self, name)
            require(value >= 0, f"{name}: must be at least 0, got {value}")
        require(
            self.prompts_per_update % self.minibatch_size == 0,
            f"minibatch_size: {self.minibatch_size} does not divide prompts_per_update "
            f"{self.prompts_per_update}",
        )
        require(
            self.prompts_per_update % self.advantage.responses_per_prompt == 0,
            f"advantage.responses_per_prompt: {self.advantage.responses_per_prompt} does not "
            f"divide prompts_per_update {self.prompts_per_update}",
        )
        for name in ("prompts_per_update", "validation_prompts"):
            value = getattr(self, name)
            require(value >= self.num_processes, f"{name}: {value} is less than the processes")
        check_roles(
            self.roles,
            lora=self.lora,
            kl=self.kl,
            advantage=self.advantage,
            optimisation=self.optimisation,
            updates=self.updates,
        )
        check_engine(self.engine, lora=self.lora)
        require(
            not (self.optimisation.compile and self.activation_checkpointing),
            "optimisation.compile: layers that activation_checkpointing computes again would be "
            "compiled at every pass; set one of them to false",
        )
        choices_of = {"sharding": SHARDING, "precision": PRECISIONS, "attention": ATTENTION}
        for name, choices in choices_of.items():
            value = getattr(self, name)
            require(value in choices, f"{name}: must be one of {', '.join(choices)}, got {value!r}")

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def wanted(self) -> Wanted:
        """Which roles there are, and how they hold their weights."""
        from pipeline.models import choose_precision

        return Wanted(
            roles=self.roles,
            lora=self.lora,
            seed=self.seed,
            critic=self.advantage.needs_value_model,
            normalise=self.reward.normalise,
            longest=self.longest,
            sharding=sharding_of(self.sharding),
            precision=choose_precision(self.precision),
            attention="fp32" if self.attention == "auto" else self.attention,
            recomputes=self.activation_checkpointing,
        )

    def content(self) -> dict[str, Any]:
        """The settings that decide what is made: not where an engine lies."""
        return {**super().content(), "engine": self.engine.content()}

    def outside(self, stage: str) -> dict[str, Path]:  # noqa: ARG002 - its names hold none
        """The sources of its reward that are no stages of the run."""
        return outside_sources(self.reward.used_sources)

    def judges(self, update: int) -> bool:
        """Returns whether the guard judges the look after so many updates."""
        distance = self.guard.every * self.validate_every
        return distance > 0 and (update % distance == 0 or update == self.updates)

    def keeps(self, update: int) -> bool:
        """Returns whether the rollout of an update (from 1) is kept."""
        distance = self.keep_rollout_every * self.validate_every
        return distance > 0 and update % distance == 0

    def settings(self, device: Any) -> Settings:
        """Returns what the trainer needs to know, what is left to the device chosen for it."""
        from pipeline.parallel import choose_workers

        wanted = self.wanted
        return Settings(
            seed=self.seed,
            updates=self.updates,
            prompts_per_update=self.prompts_per_update,
            minibatch_size=self.minibatch_size,
            microbatch_size=self.microbatch_size,
            max_response_tokens=self.max_response_tokens,
            temperature=self.temperature,
            precision=wanted.precision,
            workers=choose_workers(self.workers if wanted.sharding == "none" else 1, device),
            kl=self.kl,
            reward=self.reward,
            advantage=self.advantage,
            optimisation=self.optimisation,
            engine=self.engine,
            longest=self.longest,
        )


def open_parents(config: Config) -> dict[str, Artifact]:
    """Returns what the run is made from: stages, and sources of its reward from elsewhere."""
    parents = {
        name: open_artifact(config.folder(name), kind=kind) for name, kind in PARENTS.items()
    }
    for source in config.reward.used_sources:
        name, parents[name] = open_source(source, folder=config.folder)
    if config.guard.every:
        parents[GUARD] = open_artifact(config.folder(GUARD), kind="reward")
    return parents


def build_trainer(
    config: Config, parents: dict[str, Artifact], *, accelerator: "Accelerator"
) -> "tuple[PPOTrainer, Validation, dict[str, Any]]":
    """Returns the trainer, the validation, and what was counted on the way."""
    from pipeline.models import load_tokenizer
    from pipeline.ppo.inputs import read_inputs
    from pipeline.ppo.loading import load_roles
    from pipeline.ppo.scorers import Divided
    from pipeline.ppo.trainer import PPOTrainer
    from pipeline.ppo.validation import Validation
    from pipeline.reward.reading import Words

    tokenizer = load_tokenizer(parents["sft"].path)
    splits, text = read_inputs(
        parents["data"].path,
        tokenizer=tokenizer,
        max_tokens=config.max_prompt_tokens,
        text_length=config.longest,
        ptx=config.optimisation.ptx_coef > 0,
    )
    roles = load_roles(
        parents["sft"], parents.get("reward"), wanted=config.wanted, device=accelerator.device
    )
    settings = config.settings(accelerator.device)
    loader = Loader(
        parents=parents,
        roles=roles,
        words=Words.behind(
            [tokens for prompts in splits.values() for tokens in prompts.tokens],
            [text for prompts in splits.values() for text in prompts.texts],
            tokenizer=tokenizer,
        ),
        prompts=splits["train"].tokens,
        settings=settings,
    )
    trainer = PPOTrainer(
        roles,
        splits["train"].tokens,
        settings=settings,
        accelerator=accelerator,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        rewards=loader.rewards(),
        text=text.get("train"),
    )
    watch = None
    if config.guard.every:
        guard = Divided(loader.by_model(parents[GUARD], name=GUARD))
        watch = Watch(scorer=guard, patience=config.guard.patience)
    validation = Validation(
        trainer,
        splits["validation"].tokens,
        num_prompts=config.validation_prompts,
        tokenizer=tokenizer,
        watch=watch,
        text=text.get("validation"),
    )
    counts = {f"prompts_dropped_{name}": split.num_dropped for name, split in splits.items()}
    return trainer, validation, counts


def train(config: Config, stage: StageRun, trainer: "PPOTrainer", validation: "Validation") -> None:
    """Runs the updates that are left, with validation and resume points on the way."""
    stage.require_space(trainer.moved_bytes, trainer.moved_bytes)
    point = stage.latest_point()
    diagnoser = Diagnoser(kl_target=None if config.kl.controller == "fixed" else config.kl.target)

    def look(update: int) -> None:
        metrics = validation.look(stage, update=update, judged=config.judges(update))
        stage.log(update, diagnoser.read(metrics, update=update))

    stage.total_steps = config.updates
    if point:
        trainer.load(point[1], step=point[0])
        logged = read_jsonl(stage.path / "metrics.jsonl")
        validation.recall(logged)
        diagnoser.recall(logged)
    else:
        look(0)
    done, left = trainer.updates, range(trainer.updates, config.updates)
    saved: dict[str, float] = {}
    with keep_pace(config.saving, stage="ppo") as pace:
        for number in progress(left, total=config.updates, description="ppo", initial=done):
            if validation.ends:
                break
            outcome = trainer.update(number, goes_on=lambda: not pace.stops())
            if outcome is None:
                stage.save_point(trainer.steps, trainer.save)
                stage.stop(trainer.steps, pace.asked_by)
            update = number + 1
            stage.log(update, diagnoser.read(outcome.metrics, update=update))
            stage.log_timings(update, outcome.timings | saved)
            if update % config.validate_every == 0 or update == config.updates:
                look(update)
            if config.keeps(update) and stage.is_main:
                keep_rollout(stage.path, outcome, update=update, tokenizer=validation.tokenizer)
            due, saved = pace.after(update), {}
            if due.save or update == config.updates:
                saved = {"time/saving_seconds": stage.save_point(trainer.steps, trainer.save)}
            if due.stop:
                stage.stop(trainer.steps, pace.asked_by)


def card(config: Config, validation: "Validation", *, updates: int) -> str:
    """Returns the model card."""
    first, last = validation.looks[0], validation.looks[updates]
    rows = "\n".join(f"| {name} | {first[name]:.3f} | {last[name]:.3f} |" for name in sorted(last))
    return f"""# PPO policy of {config.run_dir.name}

The SFT model of this run, aligned with {config.reward.described} by {updates} PPO updates of
{config.prompts_per_update} responses under a KL penalty ({config.kl.controller} controller). A
reward model of this pipeline learned what raters call positive: sentiment, not helpfulness.

On {len(validation.prompts)} validation prompts, before and after:

| figure | SFT | PPO |
|---|---|---|
{rows}
"""


def run(config: Config) -> None:
    """Runs the stage.

    Raises:
        UserError: a parent does not fit, a size does not divide, or a run-time check failed.
    """
    from pipeline.ppo.fast_attention import with_fast_attention
    from pipeline.ppo.vllm_engines import check_engine_is_there

    offloads = sharding_of(config.sharding) == "fsdp2_offload"
    accelerator = setup(config, divides="stage", offloads=offloads)
    check_sharding(
        config.wanted.sharding,
        roles=config.roles,
        engine=config.engine.name,
        num_processes=world_size(),
        on_gpu=accelerator.device.type != "cpu",
        compiles=config.optimisation.compile,
    )
    parents = open_parents(config)
    check_engine_is_there(config.engine)
    with begin(config, stage="ppo", kind="causal-lm", parents=parents) as stage:
        config = stage.resolved(config)
        if config.precision == "bf16" and accelerator.device.type == "cpu":
            config = with_fast_attention(config, stage.points, sft=parents["sft"].path)
        trainer, validation, counts = build_trainer(config, parents, accelerator=accelerator)
        train(config, stage, trainer, validation)
        keep_models(stage.path, trainer, sft=parents["sft"].path)
        done = max(validation.looks)
        first, last = validation.looks[0], validation.looks[done]
        stage.finish(
            f"score {first['validation/score']:.2f} -> {last['validation/score']:.2f} "
            f"at KL {last['validation/kl']:.2f} nats, {done} of {config.updates} updates",
            chosen={
                **stage.points.chosen,
                "workers": trainer.settings.workers,
                "world_size": world_size(),
                "sharding": config.wanted.sharding,
                **({"constants": measured} if (measured := trainer.rewards.measured) else {}),
            },
            summary={**last, **counts, "updates": done},
            card=card(config, validation, updates=done),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="ppo")


if __name__ == "__main__":
    raise SystemExit(main())
