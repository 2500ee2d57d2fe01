"""Sizes that recur, where every new one costs: bfloat16 products on a processor.

oneDNN makes a program for each size of product that it meets, in some 4 ms and 0.7 MB, and keeps a
thousand of them (`benchmarks/sizes.py`). Packed rows are hardly ever as long as others were, so
their sizes are rounded up; float32 products take any size as it is.
"""

import torch
from torch import Tensor

MULTIPLE = 64
"""Tokens are filled up to multiples of it: a twentieth of a pass of 700 tokens, at most a tenth."""
ROWS = 8
"""Rows that are generated together shrink in steps of so many."""


def rounded(count: int, *, multiple: int) -> int:
    """Returns a size, in bfloat16 on a processor the next multiple, elsewhere as it is."""
    if not torch.is_autocast_enabled("cpu"):
        return count
    return -(-count // multiple) * multiple


def filled_up(values: Tensor) -> Tensor:
    """Returns values with rows of zeros behind them, as many as make a size that recurs."""
    missing = rounded(len(values), multiple=MULTIPLE) - len(values)
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
