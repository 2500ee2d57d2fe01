"""What PPO can be told: groups of settings, of the trainer and of the stage's configuration."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import require
from pipeline.ppo.engine_settings import Engine

COMBINATIONS = ("sum", "mean", "min", "mean_minus_std")
REWARD_STAGES = ("reward", "reward_guard")
PENALTIES = ("k1_in_reward", "k2_in_loss", "k3_in_loss")
ESTIMATORS = ("gae", "rloo", "grpo", "reinforce")


@dataclass(frozen=True, kw_only=True)
class KL:
    """The penalty that keeps the policy near the SFT model."""

    coef: float = 0.1
    """beta, the coefficient of the per-token KL penalty; where an adaptive controller starts."""
    controller: str = "adaptive"
    """fixed, or adaptive: the coefficient steers the KL per response to the target."""
    target: float = 6.0
    """KL per response in nats that the adaptive controller steers to."""
    horizon: float = 10000.0
    """Episodes over which the adaptive coefficient can change by about 20%."""
    length_compensation: float = 0.0
    """Share of the mean KL per token that a penalty in the reward gives back to every token; 1:
    length costs nothing."""
    penalty: str = "k1_in_reward"
    """Where the penalty acts: k1_in_reward (each token answers for the rest of the response), or
    k2_in_loss or k3_in_loss (each token for itself); the coefficients are not comparable."""
    reference_rate: float = 0.0
    """Share of the policy mixed into the reference every `reference_every` updates: 0 keeps the
    SFT model, 1 replaces it (periodic), between is a moving average. The KL is to what moved."""
    reference_every: int = 1
    """Updates between two moves of the reference."""

    def __post_init__(self) -> None:
        require(self.coef >= 0, f"kl.coef: must be at least 0, got {self.coef}")
        require(
            self.controller in ("fixed", "adaptive"),
            f"kl.controller: must be fixed or adaptive, got {self.controller!r}",
        )
        require(self.target > 0, f"kl.target: must be positive, got {self.target}")
        require(self.horizon > 0, f"kl.horizon: must be positive, got {self.horizon}")
        share = self.length_compensation
        require(0 <= share <= 1, f"kl.length_compensation: must be between 0 and 1, got {share}")
        require(
            self.penalty in PENALTIES,
            f"kl.penalty: must be one of {', '.join(PENALTIES)}, got {self.penalty!r}",
        )
        require(
            share == 0 or self.in_loss is None,
            f"kl.length_compensation: {share} has no effect with kl.penalty {self.penalty}: each "
            "token there answers for itself; set it to 0",
        )
        require(
            0 <= self.reference_rate <= 1,
            f"kl.reference_rate: must be between 0 and 1, got {self.reference_rate}",
        )
        require(
            self.reference_every >= 1,
            f"kl.reference_every: must be at least 1, got {self.reference_every}",
        )

    @property
    def in_loss(self) -> str | None:
        """The estimator that stands in the loss; None when the penalty is in the reward."""
        return None if self.penalty == "k1_in_reward" else self.penalty.removesuffix("_in_loss")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the things that score a response: a model or a function."""

    model: str = ""
    """A stage of this run, as in reward, or the folder of a sequence classifier with one label;
    with a tokenizer of its own it reads the text anew."""
    function: str = ""
    """module:function of Python: messages of prompts and texts of responses in, numbers out."""
    weight: float = 1.0
    """What its scores are multiplied by."""
    name: str = ""
    """Its metric is score/<name>; the folder's or the function's own name when empty."""
    timeout_seconds: float = 60.0
    """Longest a function may take over one rollout."""

    def __post_init__(self) -> None:
        where = f"reward.sources: {self.label or 'a source'}"
        require(
            bool(self.model) != bool(self.function),
            f"{where}: needs a model or a function, and not both",
        )
        require(
            not self.function or bool(re.fullmatch(r"\w+(\.\w+)*:\w+", self.function)),
            f"{where}: a function is module:function, got {self.function!r}",
        )
        require(
            math.isfinite(self.weight) and self.weight != 0,
            f"{where}: weight must be a number other than 0, got {self.weight}",
        )
        require(
            self.timeout_seconds > 0,
            f"{where}: timeout_seconds must be positive, got {self.timeout_seconds}",
        )

    @property
    def label(self) -> str:
        """The name it is known by."""
        return self.name or self.function.rpartition(":")[2] or Path(self.model).name

    @property
    def is_stage(self) -> bool:
        """Whether the model is a stage of the run, and not a folder from elsewhere."""
        return self.model in REWARD_STAGES


@dataclass(frozen=True, kw_only=True)
class Reward:
    """How a response's score enters its reward."""

    sources: list[Source] = field(default_factory=list)
    """What scores a response; the stage reward alone when empty."""
    combine: str = "sum"
    """One score out of several: sum or mean by weight; min, or mean_minus_std (less the population
    standard deviation over the sources), for ensembles of equals."""
    normalise: bool = True
    """Models' scores by their constants; false takes them raw, and all that is said of scores
    here and in the metrics is then in raw units. A function's scores are always its own."""
    missing_eos_score: float | None = -1.0
    """Normalised score of a response that never ended; null keeps the reward model's."""
    clip: float = 0.0
    """Normalised scores are clipped to [-clip, clip]; 0 does not clip."""
    whiten: bool = False
    """Divides the token rewards by their standard deviation, without shifting the mean: where it is
    not 0, that pays or fines every token and so length (docs/ppo.md)."""
    gamma: float = 1.0
    """Discount per token, of gae and reinforce."""
    lam: float = 0.95
    """Trace decay of generalised advantage estimation."""

    def __post_init__(self) -> None:
        self._check_sources()
        require(self.clip >= 0, f"reward.clip: must be at least 0, got {self.clip}")
        require(
            self.normalise or self.clip == 0,
            f"reward.clip: only normalised scores are clipped; set it to 0, not {self.clip}",
        )
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"reward.{name}: must be between 0 and 1, got {value}")

    def _check_sources(self) -> None:
        require(
            self.combine in COMBINATIONS,
            f"reward.combine: must be one of {', '.join(COMBINATIONS)}, got {self.combine!r}",
        )
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        require(not twice, f"reward.sources: {twice} stands there twice; give each a name")
        weights = [source.weight for source in self.sources]
        require(
            self.combine in ("sum", "mean") or weights == [1.0] * len(weights),
            f"reward.combine: {self.combine} has no weights; leave them out of reward.sources",
        )
        require(
            self.combine != "mean" or not weights or sum(weights) > 0,
            "reward.combine: the weights of a mean must sum to more than 0",
        )

    @property
    def used_sources(self) -> list[Source]:
        """The sources, the stage reward where none are named."""
        return self.sources or [Source(model="reward")]

    @property
    def described(self) -> str:
        """What scores, in words."""
        parts = ", ".join(source.label for source in self.used_sources)
        return parts if len(self.used_sources) == 1 else f"the {self.combine} of {parts}"


@dataclass(frozen=True, kw_only=True)
class Advantage:
    """What a response is held against."""

    estimator: str = "gae"
    """gae: the value model. Without one: rloo (mean of the other responses to the prompt), grpo
    (mean and deviation of all of them), reinforce (a running mean over updates)."""
    responses_per_prompt: int = 1
    """Responses to each prompt of a rollout, in adjacent rows; divides prompts_per_update, which
    counts responses. rloo and grpo need at least 2."""
    baseline_decay: float = 0.9
    """Share of the past that reinforce's running mean keeps at every update."""

    def __post_init__(self) -> None:
        require(
            self.estimator in ESTIMATORS,
            f"advantage.estimator: must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}",
        )
        fewest = 2 if self.estimator in ("rloo", "grpo") else 1
        require(
            self.responses_per_prompt >= fewest,
            f"advantage.responses_per_prompt: {self.estimator} needs at least {fewest}, "
            f"got {self.responses_per_prompt}",
        )
        require(
            0 <= self.baseline_decay < 1,
            f"advantage.baseline_decay: must be in [0, 1), got {self.baseline_decay}",
        )

    @property
    def needs_value_model(self) -> bool:
        """Whether a critic is trained."""
        return self.estimator == "gae"


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """The optimisation of one update."""

    learning_rate: float = 1.0e-4
    """AdamW's learning rate of the policy at the first update; it decays linearly to 0."""
    value_learning_rate: float = 1.0e-4
    """The same for the value model."""
    epochs: int = 4
    """Passes over the rollout in one update, each in a new order."""
    clip: float = 0.2
    """The policy's ratio is trusted within [1 - clip, 1 + clip]."""
    clip_high: float | None = None
    """The upper end is 1 + clip_high; null takes clip."""
    dual_clip: float | None = None
    """Ratio beyond which a token of negative advantage weighs no more, above 1; null: no bound."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy per token; 0 leaves it out."""
    ptx_coef: float = 0.0
    """Weight of a language-model loss on rows of the pretraining text, as many to a step as
    responses (PPO-ptx); 0 leaves it out."""
    target_kl: float | None = None
    """An update ends before a minibatch, not its first, whose KL from the sampling policy, in nats
    a token, exceeds this; null never ends it."""
    value_clip: float = 0.2
    """How far a value may move in one update before its gradient stops."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    critic_warmup: int = 0
    """Updates at the start in which the critic learns and the policy stands still, the KL
    coefficient with it: a few where the critic starts from zero, as with `roles: trunk`."""
    max_grad_norm: float = 1.0
    """Gradient norm at which each model's gradients are clipped."""
    compile: bool = False
    """Passes the layers of what is trained through torch.compile, and says after how many steps
    that has paid, if ever: on a processor it seldom does. It changes rounding only."""
    max_ratio: float = 100.0
    """A minibatch whose mean ratio exceeds this stops the stage before the optimizer moves."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "value_learning_rate", "epochs", "clip", "value_clip"):
            value = getattr(self, name)
            require(value > 0, f"optimisation.{name}: must be positive, got {value}")
        for name in ("clip_high", "target_kl"):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"optimisation.{name}: must be positive or null, got {value}",
            )
        for name in ("entropy_coef", "ptx_coef", "critic_warmup"):
            value = getattr(self, name)
            require(value >= 0, f"optimisation.{name}: must be at least 0, got {value}")
        require(
            self.dual_clip is None or self.dual_clip > 1,
            f"optimisation.dual_clip: must be above 1 or null, got {self.dual_clip}",
        )
        require(
            self.value_coef > 0,
            f"optimisation.value_coef: must be positive, got {self.value_coef}",
        )
        require(
            self.max_grad_norm > 0,
            f"optimisation.max_grad_norm: must be positive, got {self.max_grad_norm}",
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything the PPO trainer needs to know."""

    seed: int
    updates: int
    prompts_per_update: int
    minibatch_size: int
    microbatch_size: int
    max_response_tokens: int
    temperature: float
    precision: str
    workers: int
    kl: KL
    reward: Reward
    advantage: Advantage
    optimisation: Optimisation
    engine: Engine = field(default_factory=Engine)
    longest: int = 0

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps of an update that ends by itself."""
        return self.optimisation.epochs * (self.prompts_per_update // self.minibatch_size)
