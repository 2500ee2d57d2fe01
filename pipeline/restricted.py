"""What is read of pickles: tensors and plain values of a resume point, and never code.

optimizer.pt, scheduler.pt, rng_state.pth and state.pt are pickles, as torch writes them, and so are
the files of models that Accelerate or DeepSpeed divides. torch's restricted loader
(`weights_only=True`) reads them: it makes tensors, numbers, texts, lists and dictionaries, and
stops at whatever else a file names. DeepSpeed asks torch for its free loader, and is given the
restricted one with the few classes that its states are made of.
"""

import contextlib
import importlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from pipeline.config import require
from pipeline.errors import UserError

OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
"""What DeepSpeed's states name beside tensors and plain values, by module."""
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
        with _restricted_deepspeed() if saved_by_deepspeed(point) else contextlib.nullcontext():
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{point} holds more than tensors and plain values, such as code to run. {mend}"
        ) from error


def saved_by_deepspeed(point: Path) -> int:
    """Returns by how many processes DeepSpeed has saved a resume point; 0: it has not."""
    return len(list(point.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))


@contextlib.contextmanager
def _restricted_deepspeed() -> Iterator[None]:
    import torch

    known = [
        getattr(importlib.import_module(module), name)
        for module, names in OF_DEEPSPEED.items()
        for name in names
    ]
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    with mock.patch.dict(os.environ, forced), torch.serialization.safe_globals(known):
        yield
