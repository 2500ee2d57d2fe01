"""Settings of the stages that train: when they save, and how they end before their work is done."""

from dataclasses import dataclass, field

from pipeline.config import StageConfig, require


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When resume points are written, and how a stage ends before its work is done."""

    every: int = 100
    """Steps (in ppo: updates) between two resume points; 0: only at the end and when stopped."""
    minutes: float = 0.0
    """Minutes between two resume points, beside `every`; 0: by steps alone."""
    keep: int = 2
    """Resume points that are kept, the newest ones."""
    grace_seconds: float = 60.0
    """Seconds from SIGTERM or Ctrl-C until the stage ends even when its step is not done; what
    saving may take before the deadline."""
    deadline: float = 0.0
    """Time at which the stage must have ended, in seconds since 1970, as Slurm's
    SLURM_JOB_END_TIME; it saves and stops before. 0: none."""

    def __post_init__(self) -> None:
        for name in ("every", "minutes", "deadline"):
            value = getattr(self, name)
            require(value >= 0, f"saving.{name}: must be at least 0, got {value}")
        require(self.keep >= 1, f"saving.keep: must be at least 1, got {self.keep}")
        require(
            self.grace_seconds > 0,
            f"saving.grace_seconds: must be positive, got {self.grace_seconds}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StageConfig):
    """What every stage that trains can be told."""

    saving: Saving = field(default_factory=Saving)
    """Resume points, and how the stage stops."""
    activation_checkpointing: bool = False
    """Keep only the inputs of a model's layers for the backward pass and compute the rest again:
    less memory, about a third more time."""


def saving_of(config: StageConfig) -> Saving:
    """Returns a stage's settings of saving; those of a stage that does not train are idle."""
    return config.saving if isinstance(config, TrainingConfig) else Saving()
