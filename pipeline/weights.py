"""Models of a folder or hub id: loaded whole or not at all, whatever stands in their files."""

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.errors import UserError, told
from pipeline.pretrained import from_pretrained
from pipeline.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAMED = 3
"""Tensors that a message names."""
CLASSIFIER = "ForSequenceClassification"
"""How Transformers' names of models that score texts end."""
BEST = None
"""Attention that Transformers chooses, whatever a config.json says: SDPA, or eager where a model's
class knows no other (GPT-J, BLOOM, Gemma 2 with its capped scores)."""
CAUSAL = ("gpt_neox", "gpt_neox_japanese")
"""Models that read what stands before a token alone, though their configurations say that they are
no decoders."""


def load_whole(
    auto_class: Any, path: Path | str, *, new_head: bool = False, **options: Any
) -> "PreTrainedModel":
    """Returns the model with every weight from its files.

    Transformers draws at random what a checkpoint lacks, and warns; here that is refused.

    Args:
        auto_class: Transformers' class for the task.
        path: folder or hub id.
        new_head: whether layers above the body may be missing.
        options: of from_pretrained.

    Raises:
        UserError: no model there, or its files hold no such weights.
    """
    with told(f"{path}: no model could be loaded from there"), _quiet():
        model, info = from_pretrained(
            auto_class,
            path,
            weights=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    body = f"{model.base_model_prefix}."
    lacking = [
        name
        for name in info["missing_keys"]
        if not new_head or (name.startswith(body) and ".pooler." not in name)
    ]
    _refuse(path, lacking, "its files lack the weights")
    _refuse(path, [found[0] for found in info["mismatched_keys"]], "of another shape are")
    _refuse(path, _whole_numbers(model, path), "whole numbers stand for the weights")
    if info["unexpected_keys"] and not new_head:
        named = _named(info["unexpected_keys"])
        log.warning("%s: weights that its architecture does not have are left out: %s", path, named)
    loaded: PreTrainedModel = model
    return loaded


def check_it_writes(path: Path) -> None:
    """Raises UserError where a reward model's or a critic's folder stands for a language model's.

    With embeddings that are tied all weights of one are there, and its replies would be noise.
    """
    found = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    named = found.get("architectures") if isinstance(found, dict) else None
    names = [str(name) for name in named] if isinstance(named, list) else []
    require(
        not any(name.endswith(CLASSIFIER) for name in names),
        f"{path} holds {', '.join(names)}, which scores texts and writes none. Name the folder of "
        "a causal language model",
    )


def check_it_continues(model: Any, where: str) -> None:
    """Raises UserError where a model of Transformers' causal ones cannot continue a text here.

    Those of encoders read what stands behind a token too, unless their configuration makes them
    decoders, and Transformers only warns.

    Args:
        model: with weights or without.
        where: place of the model, or the setting that names it.
    """
    config = model.config
    require(
        getattr(config, "is_decoder", None) is not False or config.model_type in CAUSAL,
        f"{where}: {config.model_type} is an encoder, which reads what stands behind a token too "
        "and so cannot write. Name a causal language model; reward.init_from takes encoders",
    )


def _whole_numbers(model: Any, path: Path | str) -> list[str]:
    """Returns the parameters whose tensors in a folder are not of floating point."""
    from safetensors import safe_open

    if getattr(model, "is_quantized", False):
        return []
    parameters = {name for name, _ in model.named_parameters()}
    found = []
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            held = parameters & set(tensors.keys())
            found += [name for name in held if not _is_float(tensors.get_slice(name).get_dtype())]
    return found


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def _refuse(path: Path | str, names: Collection[str], fault: str) -> None:
    if names:
        raise UserError(f"{path}: {fault} {_named(names)}; fetch or make the folder again")


def _named(names: Collection[str]) -> str:
    chosen = sorted(names)[:NAMED]
    return ", ".join(chosen) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Transformers from reporting in tables what is told here in one line."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
