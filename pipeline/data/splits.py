"""Splits by group, so that no conversation, document or text has rows in two splits."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    numbers = _in_order(len(ordered), split)
    return {group: SPLITS[number] for group, number in zip(ordered, numbers, strict=True)}


def group_key(group: str, *, seed: int) -> int:
    """Returns 64 bits that stand for a group, and order groups as `assign` does."""
    return int(_hash(group, seed=seed)[:16], 16)


class Places:
    """The splits of all groups so far, nine bytes each, however long their names are."""

    def __init__(self) -> None:
        import numpy as np

        self._keys = np.empty(0, np.uint64)
        self._numbers = np.empty(0, np.uint8)

    def place(self, keys: "NDArray[np.uint64]", split: Split) -> "NDArray[np.uint8]":
        """Returns the number in SPLITS of each row's group, as `assign` would.

        A group that was placed before stays where it is; the others are split among themselves.

        Args:
            keys: `group_key` of each row's group.
            split: shares held out of the new groups.
        """
        import numpy as np

        new = np.setdiff1d(keys, self._keys)
        numbers = np.array(_in_order(len(new), split), np.uint8)
        where = np.searchsorted(self._keys, new)
        self._keys = np.insert(self._keys, where, new)
        self._numbers = np.insert(self._numbers, where, numbers)
        placed: NDArray[np.uint8] = self._numbers[np.searchsorted(self._keys, keys)]
        return placed


def _in_order(num_groups: int, split: Split) -> list[int]:
    """The number in SPLITS of each group in the order of their hashes."""
    num_test = max(1, round(num_groups * split.test_frac)) if num_groups > 2 else 0
    num_validation = max(1, round(num_groups * split.validation_frac)) if num_test else 0
    num_train = num_groups - num_test - num_validation
    return [2] * num_test + [1] * num_validation + [0] * num_train


def _hash(group: str, *, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()
