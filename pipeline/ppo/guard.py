"""The guard: a second reward model that watches PPO for over-optimisation and never trains it.

It learned from other texts than the reward model, so what only the reward model likes is a mistake
of that one (Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization"). Never the gold
score, which belongs to `evaluate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import require
from pipeline.distributed import is_main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.ppo.scorers import Scorer
    from pipeline.ppo.trainer import PPOTrainer

BEST = "best"
"""Name of the folder, in that of ppo, of the policy that the guard likes best."""
DROP = 0.1
"""Fall of the guard's normalised score that counts, in deviations of the SFT model's replies."""

Look = tuple[float, float]
"""The guard's score and the reward model's at one look at validation."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What the guard does; it needs the folder reward_guard."""

    every: int = 0
    """Looks at validation between two that the guard judges; 0: no guard."""
    patience: int = 2
    """Judged looks in a row that show over-optimisation before PPO ends early."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"guard.every: must be at least 0, got {self.every}")
        require(self.patience >= 1, f"guard.patience: must be at least 1, got {self.patience}")


def over_optimised(looks: Sequence[Look], *, patience: int) -> bool:
    """Returns whether the guard fell while the score rose, in the last `patience` looks.

    Each of them lies at least DROP below the guard's best before them, and above the reward model's
    score at that best.
    """
    earlier, last = looks[:-patience], looks[-patience:]
    if not earlier:
        return False
    best_guard, score = max(earlier, key=lambda look: look[0])
    return all(look[0] < best_guard - DROP and look[1] > score for look in last)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who judges the looks at validation, and how patiently."""

    scorer: "Scorer"
    """The second reward model."""
    patience: int
    """Judged looks in a row that show over-optimisation before PPO ends early."""

    def judge(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> float:
        """Returns the guard's mean normalised score of responses to prompts, in tokens."""
        return float(self.scorer(prompts, responses).mean())


def keep_best(trainer: "PPOTrainer", *, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Writes the policy as it is now, with its tokenizer; every process must call it."""
    from pipeline.sharding import save_role

    save_role(trainer.roles.policy, folder)
    if is_main():
        tokenizer.save_pretrained(folder)
