"""Splits by group, so that no conversation, document or text has rows in two splits."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config import require

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which share of the groups is held out."""

    validation_frac: float = 0.1
    """Share of the groups (conversations, documents or texts) on which every choice is made."""
    test_frac: float = 0.1
    """Share of the groups that only the published evaluation reads."""

    def check(self, field: str) -> None:
        """Raises UserError, naming the field's path, for a share out of range."""
        for name in ("validation_frac", "test_frac"):
            value = getattr(self, name)
            require(0 < value < 0.5, f"{field}.{name}: must be above 0 and below 0.5, got {value}")


def assign(groups: Iterable[str], split: Split, *, seed: int) -> dict[str, str]:
    """Returns the split of every group, independent of the order they come in.

    Groups are sorted by a hash of seed and name; the first ones are test, the next validation.
    Each held-out split gets at least one group where there are three or more.
    """
    ordered = sorted(set(groups), key=lambda group: (_hash(group, seed=seed), group))
    num_test = max(1, round(len(ordered) * split.test_frac)) if len(ordered) > 2 else 0
    num_validation = max(1, round(len(ordered) * split.validation_frac)) if num_test else 0
    names = ["test"] * num_test + ["validation"] * num_validation
    names += ["train"] * (len(ordered) - len(names))
    return dict(zip(ordered, names, strict=True))


def _hash(group: str, *, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()
