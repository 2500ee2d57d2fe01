"""What tests share: tolerances, tiny models, a predictable tokenizer, a home folder."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SMOKE = ["--recipe=smoke", "--tracking=none", "--threads=1"]
"""Words of a stage of the smoke recipe in a test."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def assert_close(actual: torch.Tensor, expected: Any, *, tolerance: float | None = None) -> None:
    """Compares tensors; the tolerance follows from the actual's precision unless it is given."""
    allowed = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    wanted = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=allowed, atol=allowed)


def tiny_llama(*, vocabulary: int = 24, seed: int = 0, hidden: int = 16) -> Any:
    """A causal LM of a few thousand random weights, spread so that its tokens differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama_config(LlamaConfig, vocabulary, hidden)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    return model


class MostRows(TorchDispatchMode):
    """Sees the most rows of a tensor that has so many columns, forward and backward."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        """Runs an operation and looks at what it makes."""
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.ndim > 1 and one.shape[-1] == self.columns:
                self.rows = max(self.rows, one.numel() // self.columns)
        return made


def tiny_reward_model(*, vocabulary: int = 24, seed: int = 1, hidden: int = 16) -> Any:
    """A reward model of the same size, with normalisation constants that are not 0 and 1."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = _llama_config(LlamaConfig, vocabulary, hidden)
    config.num_labels = 1
    config.reward_mean, config.reward_std = 0.25, 2.0
    return LlamaForSequenceClassification(config).eval()


def _llama_config(config_class: Any, vocabulary: int, hidden: int) -> Any:
    return config_class(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def make_corpus(folder: Path) -> None:
    """Makes the smoke recipe's data and tokenizer in a run folder."""
    from pipeline.config import load
    from stages import data, tokenizer

    for stage, module in {"data": data, "tokenizer": tokenizer}.items():
        module.run(load(module.Config, [*SMOKE, f"--run={folder}"], stage=stage))


def copy_corpus(folder: Path, run: Path) -> None:
    """Copies data and tokenizer of one run folder into another."""
    for stage in ("data", "tokenizer"):
        shutil.copytree(folder / stage, run / stage)


def at_home(
    *command: str, folder: Path, variables: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a home folder of a test's own, where no tracker has an account."""
    accounts = ("WANDB_", "TRACKIO_", "NETRC")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(accounts)}
    return subprocess.run(
        command,
        cwd=folder,
        env={**inherited, "HOME": str(folder), "PYTHONPATH": str(Path.cwd()), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )
