"""The one door by which models, tokenizers and configurations come in from a folder or the hub.

What is read is data: JSON, text, safetensors, GGUF. Weights in a pickle are refused, for a pickle
can run code; Python code that a model brings runs only where the configuration names that model.
"""

import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import require
from pipeline.distributed import is_main
from pipeline.errors import UserError
from pipeline.storage import read_json

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""How the names of pickled weights end."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""Names under which configurations say how many layers a model has."""
WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")
"""Names of what is one side of some matrix whose other side is the hidden size."""
PIN = "@"
"""Stands between a hub id and the commit (or tag) that is meant: owner/name@0123abc."""
DATA = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What is fetched from the hub beside weights."""

_permitted: set[Path] = set()
"""Models whose code may run: of the whole process, so that no caller can forget to ask."""
_announced: set[Path] = set()
_commits: dict[str, str] = {}
"""Commits of the hub that this process has read, by the models' names: it reads no other, though a
branch may move in between."""


def permit(names: Iterable[str]) -> None:
    """Lets the Python code of these models run in this process, and of no other."""
    _permitted.clear()
    _permitted.update(map(Path, names))


def from_pretrained(auto_class: Any, name: Path | str, *, weights: bool, **options: Any) -> Any:
    """Returns what an auto class of Transformers makes of a model's folder.

    Args:
        auto_class: AutoTokenizer, AutoConfig, AutoModelForCausalLM, ….
        name: folder or hub id, perhaps with a commit, as the configuration names it.
        weights: whether it loads weights.
        options: for the class's own `from_pretrained`.

    Raises:
        UserError: weights that are no safetensors, or far fewer than its config.json tells of; an
            adapter; code that was not permitted, or a library that is not installed.
        OSError: Transformers found nothing to load.
        ValueError: the same.
    """
    permitted = Path(name) in _permitted
    folder = _folder_of(name, (*DATA, "*.py") if permitted else DATA)
    require(
        not (folder / "adapter_config.json").is_file(),
        f"{name} is an adapter. Merge it into its base (peft: merge_and_unload) and name the "
        "folder of the whole model",
    )
    if options.get("gguf_file"):
        # By its whole path: Transformers prefers a file of that name where the command runs.
        options["gguf_file"] = str((folder / options["gguf_file"]).absolute())
    elif weights:
        _check_weights(folder, name=name)
    if permitted:
        _announce(folder, name=name)
    try:
        return auto_class.from_pretrained(folder, trust_remote_code=permitted, **options)
    except (ImportError, OSError, ValueError) as error:
        if brings_code(folder) and not permitted:
            raise UserError(
                f"{name} brings Python code of its own, which does not run unless you permit it. "
                f"Read that code, then set trust_remote_code: [{name}]"
            ) from error
        if isinstance(error, ImportError):
            raise UserError(f"{name}: its code needs what is not installed ({error})") from error
        raise


def commit_of(name: Path | str) -> str | None:
    """Returns the commit of the hub that this process reads by a name; None of a folder."""
    _folder_of(name, ("config.json",))
    return _commits.get(str(name))


def is_place(name: Path | str) -> bool:
    """Returns whether a model's name is a place on this disk: no name on the hub looks like it."""
    repository = str(name).partition(PIN)[0]
    return repository.startswith(("/", ".", "~")) or repository.count("/") > 1


def brings_code(folder: Path) -> bool:
    """Returns whether a model's folder names Python code of its own."""
    settings = [_json(folder / "config.json"), _json(folder / "tokenizer_config.json")]
    named = any("auto_map" in found for found in settings)
    return named or (folder / "custom_generate" / "generate.py").is_file()


def weight_files(folder: Path, *, name: Path | str) -> list[str]:
    """Returns the names of the files in which a model's weights are said to lie.

    Raises:
        UserError: one is no safetensors file of that folder.
    """
    sharded = (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()
    first = _json(folder / "config.json").get("transformers_weights") or (
        INDEX if sharded else WEIGHTS
    )
    found = [first]
    if str(first).endswith(".index.json") and Path(str(first)).name == first:
        places = _json(folder / first).get("weight_map")
        found = sorted({*map(str, places.values())}) if isinstance(places, dict) else []
    for file in map(str, found):
        require(
            Path(file).name == file and file.endswith(".safetensors"),
            f"{name}: its weights are said to lie in {file!r}, which is no safetensors file of "
            "that folder. Get the model from its maker again",
        )
    return found


def _check_weights(folder: Path, *, name: Path | str) -> None:
    """Fetches the weights of a model on the hub.

    Raises:
        UserError: they are no safetensors, or its config.json describes a larger model.
    """
    files = weight_files(folder, name=name)
    _folder_of(name, [glob.escape(file) for file in files])
    missing = [file for file in files or [WEIGHTS] if not (folder / file).is_file()]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    reason = (
        f"Weights in {pickled[0]} are not read, for a pickle can run code. Where you trust it, "
        "save the model as safetensors (save_pretrained of a recent transformers)"
        if pickled
        else "Name a whole model whose weights are safetensors"
    )
    require(
        not missing,
        f"{name}: no model could be loaded from there, it has no {', '.join(missing)}. {reason}",
    )
    _check_sizes(folder, [folder / str(file) for file in files], name=name)


def _check_sizes(folder: Path, files: Sequence[Path], *, name: Path | str) -> None:
    """Raises UserError where config.json tells of far more than the files hold.

    Transformers would make all of it first, and fill the memory, before it finds them lacking. A
    weight of a quantised model takes a quarter of a byte at least.
    """
    config = _json(folder / "config.json")
    tensors = sum(len(_tensors(file)) for file in files)
    room = 4 * sum(file.stat().st_size for file in files)
    sizes = {key: value for key, value in config.items() if type(value) is int}
    heads = sizes.get("head_dim", 0) * sizes.get("num_attention_heads", 0)
    largest = sizes.get("hidden_size", 0) * max(heads, *(sizes.get(key, 0) for key in WIDTHS))
    require(
        max(_depths(config), default=0) <= tensors and largest <= room,
        f"{name}: its config.json describes a larger model than its {tensors} tensors make; fetch "
        "or make the folder again",
    )


def _tensors(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _depths(config: dict[str, Any]) -> Iterator[int]:
    """Yields the numbers of layers of a configuration and of those within it."""
    for key, value in config.items():
        if key in DEPTHS and isinstance(value, int):
            yield value
        elif isinstance(value, dict):
            yield from _depths(value)


def _announce(folder: Path, *, name: Path | str) -> None:
    if brings_code(folder) and Path(name) not in _announced and is_main():
        _announced.add(Path(name))
        log.warning("%s: Python code that it brings runs now, as trust_remote_code permits", name)


def _folder_of(name: Path | str, patterns: Sequence[str]) -> Path:
    """Returns a model's folder; of one on the hub that of the cache, once it has those files."""
    if Path(name).is_dir():
        return Path(name)
    if is_place(name):
        raise FileNotFoundError("there is no such folder")
    from huggingface_hub import snapshot_download

    repository, _, pinned = str(name).partition(PIN)
    commit = _commits.get(str(name)) or pinned or None
    folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(patterns)))
    if folder.parent.name == "snapshots":
        _commits[str(name)] = folder.name
    return folder


def _json(file: Path) -> dict[str, Any]:
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
