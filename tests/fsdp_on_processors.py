"""Runs a stage whose model Accelerate divides (fsdp2.yaml), on processors, which it refuses itself.

python -m pipeline.launch 2 tests.fsdp_on_processors stages.sft --recipe=smoke

The processes say that they are on GPUs and compute on processors; all else is Accelerate's and
Trainer's own code.
"""

import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import DistributedType, PartialState

from pipeline.placement import as_configured

FSDP2 = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"


def connect(*_, **__) -> tuple[str, DistributedType]:
    """Stands for the choice of a backend, which takes FSDP on GPUs alone."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def compute_here(state: PartialState) -> None:
    state.device = torch.device("cpu")


def main(module: str, *words: str) -> int:
    """Returns the exit code of the stage."""
    del os.environ["ACCELERATE_USE_CPU"]
    with mock.patch("torch.cuda.device_count", return_value=2):
        os.environ |= as_configured(FSDP2).environment
    with (
        mock.patch.object(PartialState, "_prepare_backend", connect),
        mock.patch.object(PartialState, "set_device", compute_here),
    ):
        code: int = importlib.import_module(module).main(list(words))
    return code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
