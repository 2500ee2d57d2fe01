"""LoRA: small trained adapters on a frozen base (Hu et al. 2022); QLoRA: that base in 4 bits.

The adapter W x + (alpha / rank) B A x is peft's; this module chooses it, writes it so that plain
peft reads it, and merges it. Importable without torch.
"""

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.errors import installing
from pipeline.manifest import mending_command
from pipeline.storage import read_json, write_json
from pipeline.streams import stream

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTER = "adapter"
"""Folder of the adapter, beside the merged weights."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters that are trained in place of all weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: int = 32
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout in front of the adapters, in training only; ppo takes none."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter, as in [q_proj,v_proj]; empty: every linear layer
    below the head."""
    quantise: str = "none"
    """none, or 4bit: the frozen base in 4-bit NormalFloat (QLoRA); needs bitsandbytes."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank: must be at least 0, got {self.rank}")
        require(self.alpha >= 1, f"lora.alpha: must be at least 1, got {self.alpha}")
        require(0 <= self.dropout < 1, f"lora.dropout: must be in [0, 1), got {self.dropout}")
        require(
            self.quantise in ("none", "4bit"),
            f"lora.quantise: must be none or 4bit, got {self.quantise!r}",
        )
        require(
            self.rank > 0 or self.quantise == "none",
            f"lora.quantise: a base in {self.quantise} cannot be trained itself; set lora.rank",
        )


def quantisation(
    wanted: str, *, setting: str = "lora.quantise", otherwise: str = "none"
) -> Any | None:
    """Returns what transformers needs to load a model in 4 bits, None for full precision.

    NormalFloat with quantised constants (Dettmers et al. 2023, section 3). Heads stay as they are.

    Args:
        wanted: none, or 4bit.
        setting: by which the user asked for it.
        otherwise: what that is to be set to where it cannot be.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if wanted == "none":
        return None
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"{setting}: {wanted} needs bitsandbytes, which is missing; set it to {otherwise}, or run: "
        f"{installing('qlora')}",
    )
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def keep_differentiable(model: "PreTrainedModel") -> None:
    """Keeps the codes of 4-bit layers in the order in which bitsandbytes can go backward.

    On processors with AVX-512 and bfloat16 it sorts them anew when a layer is read in evaluation
    mode, for a kernel without a backward pass, and from then on takes that kernel in training too:
    adapters further down would get no gradient, with a warning at most.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def adapter_config(lora: LoRA, model: "PreTrainedModel", *, task: str) -> Any:
    """Returns peft's configuration of new adapters, which start as no change (B is 0).

    Args:
        lora: the settings.
        model: what the adapters are for.
        task: peft's name of it: CAUSAL_LM, or SEQ_CLS, whose head is trained and kept too.

    Raises:
        UserError: the model's body has no linear layer of a name in `lora.targets`.
    """
    from peft import LoraConfig
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = {
        name.rpartition(".")[2]
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    unknown = [name for name in lora.targets if name not in names]
    family = model.config.model_type
    require(not unknown, f"lora.targets: {family} has no linear layer named {unknown}")
    return LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
    )


def with_adapter(model: "PreTrainedModel", lora: LoRA, *, task: str, seed: int) -> Any:
    """Returns peft's wrapper of the model with new adapters in it; at rank 0 the model itself.

    The model's own weights are frozen; `model` reads through the adapters as the wrapper does.
    """
    import torch
    from peft import get_peft_model

    if not lora.rank:
        return model
    torch.manual_seed(stream(seed, "adapter"))
    with quiet_about_old_names():
        return get_peft_model(model, adapter_config(lora, model, task=task))


def write_adapter(
    folder: Path, config: Any, tensors: Mapping[str, "Tensor"], *, base: Path
) -> None:
    """Writes an adapter as `PeftModel.from_pretrained(base, folder)` reads it.

    Args:
        folder: where.
        config: peft's configuration of the adapter.
        tensors: its weights by peft's names.
        base: folder of the base; only its name is written, so that a moved run stays the same.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    kept = copy.deepcopy(config)
    kept.inference_mode, kept.base_model_name_or_path = True, base.name
    kept.save_pretrained(folder)
    written = read_json(folder / "adapter_config.json")
    written["target_modules"] = sorted(written["target_modules"])  # a set has no order to repeat
    write_json(folder / "adapter_config.json", written)


def check_adapter(folder: Path) -> None:
    """Makes sure that a folder holds an adapter as `write_adapter` writes them.

    peft would read a pickle where there are no safetensors, other folders for other kinds of
    adapters, and import any module that `megatron_core` names.

    Raises:
        UserError: it holds something else.
    """
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(file) if file.is_file() else {}
    plain = isinstance(config, dict) and config.get("peft_type") == "LORA"
    require(
        plain and not config.get("megatron_config") and weights.is_file(),
        f"{folder} is no LoRA adapter with its weights in {weights.name}. "
        f"Run: {mending_command(folder.parent)} FORCE=1",
    )


def with_trained_adapter(base: "PreTrainedModel", folder: Path) -> Any:
    """Returns peft's wrapper of the base with the adapter of a folder in it, in evaluation mode.

    The base reads through the adapter, and through the head that is kept with it, as well.
    """
    from peft import PeftModel

    check_adapter(folder)
    with quiet_about_old_names():
        return PeftModel.from_pretrained(base, folder).eval()


def merged(base: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """Returns the base with the adapter of a folder added to its weights, in evaluation mode."""
    return with_trained_adapter(base, folder).merge_and_unload().eval()


@contextlib.contextmanager
def quiet_about_old_names() -> Iterator[None]:
    """Keeps transformers from reporting that peft 0.21 asks for a property by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
