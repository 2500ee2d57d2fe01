"""Random batches of responses of every length, with junk where there is no token."""

import torch
from hypothesis import strategies as st

JUNK = (1e6, float("nan"), float("inf"), -float("inf"))

batches = st.builds(
    lambda seed, rows, width: Ragged(seed, rows=rows, width=width),
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    width=st.integers(1, 8),
)
"""Any shape; lengths from 1 to the width, so that the last columns may hold no token at all."""


class Ragged:
    """A mask, and as many float64 tensors of that shape as a test draws."""

    def __init__(self, seed: int, *, rows: int = 5, width: int = 7) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, width + 1, (rows,), generator=self.generator)
        self.mask = torch.arange(width) < self.lengths[:, None]
        self.num_tokens = int(self.mask.sum())

    def __repr__(self) -> str:
        return f"Ragged(lengths={self.lengths.tolist()}, width={self.mask.shape[1]})"

    def draw(self, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers on tokens, junk elsewhere (not a number and infinity among it)."""
        numbers = torch.randn(self.mask.shape, generator=self.generator).double() * scale
        which = torch.randint(len(JUNK), self.mask.shape, generator=self.generator)
        return torch.where(self.mask, numbers, torch.tensor(JUNK).double()[which])

    def per_row(self) -> torch.Tensor:
        """One normal number per response."""
        return torch.randn(len(self.mask), generator=self.generator).double()

    def rows(self, values: torch.Tensor) -> list[list[float]]:
        """The tokens of each response as plain numbers, for the reference."""
        return [
            row[:length].tolist() for row, length in zip(values, self.lengths.tolist(), strict=True)
        ]

    def padded(self, rows: list[list[float]]) -> torch.Tensor:
        """The reference's numbers as a tensor, 0 where there is no token."""
        width = self.mask.shape[1]
        return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)
