"""A finished folder's manifest: how it is sealed, read and refused, and what makes it anew."""

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.shapes import (
    are_texts,
    each,
    holds,
    is_amount,
    is_digest,
    is_object,
    is_text,
    is_whole,
    mapping,
)
from pipeline.storage import read_json, sealed

MANIFEST = "manifest.json"
CHAIN = ("data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report")
"""Stages of every run, each a folder with a manifest, in an order that puts parents first."""
OPTIONAL = ("reward_guard",)
"""Stages that a run may do without."""
STAGES = (*CHAIN[:5], *OPTIONAL, *CHAIN[5:])
"""All stages, in such an order too."""
FORMAT_VERSION = 2
READABLE = (1, 2)
"""Version 1 had no digest of the manifest itself."""
FILES = each(mapping({"sha256": holds(is_digest), "size": holds(is_whole)}))
PARENTS = each(
    mapping(dict.fromkeys(("stage", "kind"), holds(is_text)) | {"digest": holds(is_digest)})
)
CONTENT = mapping(
    {
        "stage": holds(is_text),
        "kind": holds(is_text),
        "config": holds(is_object),
        "parents": PARENTS,
        "files": FILES,
    }
)
"""What is read of a manifest's content."""
CIRCUMSTANCES = mapping(
    {
        "summary": holds(is_object),
        "wall_seconds": holds(is_amount),
        "peak_memory_gib": holds(is_amount),
        "num_processes": holds(is_whole),
        "git_commit": holds(is_text),
        "overrides?": holds(are_texts),
    }
)
"""What is read of its circumstances."""

_recipes: dict[Path, str] = {}
"""Recipes by run folder: of the whole process, so that every message can name the right one."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a finished folder, whose files are not looked at.

    Raises:
        UserError: it is no manifest, was altered, or is of a format that this version does not
            read; the message names the command that makes the folder anew.
    """
    path, mend = folder / MANIFEST, f"{mending_command(folder)} FORCE=1"
    manifest: Any = read_json(path)
    if isinstance(manifest, dict) and not is_object(manifest):
        raise UserError(f"{path} is damaged: its texts are no UTF-8, or too deep. Run: {mend}")
    content: Any = manifest.get("content") if isinstance(manifest, dict) else None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in READABLE:
        raise UserError(f"{path} {_refusal(manifest, version)}, or run: {mend}")
    if (version > 1 or "sha256" in manifest) and sealed(manifest) != manifest:
        raise UserError(f"{path} was altered. Run: {mend}")
    place = CONTENT(content)
    if place is None:
        place = mapping({"circumstances": CIRCUMSTANCES})(manifest)
    if place is not None:
        raise UserError(f"{path} is damaged: no {place}. Run: {mend}")
    checked: dict[str, Any] = manifest
    return checked


def _refusal(manifest: Any, version: Any) -> str:
    """Returns what is wrong with a manifest of another format, and what reads it still."""
    if version is None:
        return f"is not a manifest: it names no format (this version reads format {READABLE[-1]})"
    about = manifest.get("circumstances")
    commit = about.get("git_commit", "unknown") if isinstance(about, dict) else "unknown"
    return (
        f"is not of format {READABLE[-1]}, which this version reads, but of {version!r}: "
        f"read it with the version that wrote it (commit {commit})"
    )


def remember_recipe(run: Path, recipe: str) -> None:
    """Notes the recipe of this process's run folder, whose name need not tell it."""
    _recipes[run] = recipe


def mending_command(path: Path) -> str:
    """Returns the command that makes a stage's folder anew."""
    run, recipe = path.parent, path.parent.name
    known = _recipes.get(run)
    is_recipes = run.parent.name == "runs" and (Path("configs") / recipe).is_dir()
    if is_recipes and known in (None, recipe):
        return f"make {path.name} RECIPE={recipe}"
    return f"make {path.name}{f' RECIPE={known}' if known else ''} RUN={run}"
