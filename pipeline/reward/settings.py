"""What a stage that trains a reward model can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import require
from pipeline.lora import LoRA
from pipeline.origin import local_origin
from pipeline.saving import TrainingConfig
from pipeline.training import Training


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Constants that bring the scores of the SFT model's own replies to mean 0 and deviation 1."""

    num_samples: int = 512
    """Replies of the SFT model, each to another training prompt (fewer prompts repeat)."""
    response_tokens: int = 32
    """Longest reply in tokens; the same as in ppo."""
    batch_size: int = 256
    """Replies that a process samples together: fewer take less memory and more time."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("response_tokens", 2), ("batch_size", 1)):
            value = getattr(self, name)
            require(value >= least, f"normalisation.{name}: must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Settings of a stage that trains a reward model.

    A training row is a ranking, and a pair is a ranking of two.
    """

    row_type: str = "preferences"
    """Rows that are trained on: preferences or guard_preferences."""
    init_from: str = ""
    """Model to start from with its own tokenizer, an encoder (BERT) perhaps: folder, or hub id
    (`owner/name@commit` pins it); the stage sft and its tokenizer when empty."""
    pack: bool = True
    """Texts of a ranking stand side by side in rows that begin with their prompt, each seeing that
    and itself; false reads every text by itself, as models of `init_from` always do, and as those
    must whose attention takes no mask of its own (recurrent ones)."""
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
    report_gap: float = 0.5
    """Least difference of mean ratings of the pairs that held-out accuracy counts."""
    normalisation: Normalisation = field(default_factory=Normalisation)
    """Constants written into the model's configuration."""
    training: Training = field(default_factory=Training)
    """How the weights are moved; its rows are rankings."""
    lora: LoRA = field(default_factory=LoRA)
    """Adapters, and the head, that are trained in place of all weights; ppo's `roles: lora` needs
    them."""

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
        require(self.max_length >= 1, f"max_length: must be at least 1, got {self.max_length}")
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

    def outside(self, stage: str) -> dict[str, Path]:
        """The model to start from, where it lies on this disk."""
        return local_origin(self.init_from, stage=stage)
