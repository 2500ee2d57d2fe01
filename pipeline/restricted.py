"""What is read of pickles: tensors and plain values of a resume point, and never code.

optimizer.pt, scheduler.pt, rng_state.pth and state.pt are pickles, as torch writes them, and so are
the files of models that Accelerate divides. torch's restricted loader (`weights_only=True`) reads
them: it makes tensors, numbers, texts, lists and dictionaries, and stops at whatever else a file
names.
"""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import require
from pipeline.errors import UserError

DIVIDED_WEIGHTS = "pytorch_model_fsdp.bin"
"""Where Accelerate writes the weights of a model that it divides. What it reads them and
`optimizer.bin` with is the restricted loader too (accelerate 1.15, utils/fsdp_utils.py)."""
READ_RESTRICTED = (DIVIDED_WEIGHTS, "optimizer.bin")


@contextlib.contextmanager
def restricted(point: Path | None) -> Iterator[None]:
    """Turns what the restricted loader stops at into a user's one line.

    Args:
        point: folder of the resume point that is read inside; None at a fresh start.

    Raises:
        UserError: a file of the point asks for code, or its weights are pickled.
    """
    if point is None:
        yield
        return
    mend = f"None of it was used. Delete {point} and run the same command again"
    pickled = sorted({file.name for file in point.glob("*.bin")} - {*READ_RESTRICTED})
    require(not pickled, f"{point} holds {pickled}: its weights are safetensors alone. {mend}")
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{point} holds more than tensors and plain values, such as code to run. {mend}"
        ) from error
