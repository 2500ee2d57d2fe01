"""Lineage: what a folder was made from, and whether all of that is still what it was.

A folder's parents are the folders beside it by their names, so a run that was moved or copied
verifies as before. What came from outside the run is known by the digests of its files alone.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint import Artifact, verified
from pipeline.errors import UserError
from pipeline.manifest import MANIFEST, mending_command, read_manifest
from pipeline.storage import CHECKPOINTS, UNDIGESTED, digest_of, faults, flatten, read_json

log = logging.getLogger(__name__)

STATES = ("missing", "unfinished", "altered", "stale", "good")
"""What can be said of a folder, the worst first."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a folder."""

    state: str
    """One of STATES."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """A parent of a folder: what it was when the folder was made, and what lies there now."""

    name: str
    kind: str
    recorded: str
    """Digest when the folder was made."""
    found: str
    """Digest now; empty where there is nothing, or it lies outside the run."""
    is_beside: bool
    """Whether it is a stage of the same run, and not something from outside."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished folder, as its manifest tells of it."""

    stage: str
    kind: str
    digest: str
    finished: str
    """When, as ISO 8601 in UTC."""
    git_commit: str
    overrides: tuple[str, ...]
    """Command-line words it was made with."""
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Digest and size by name."""
    links: tuple[Link, ...]


@dataclass(kw_only=True)
class Row:
    """A folder, and all that was found about it."""

    stage: str
    entry: Entry | None
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and is not wrong."""

    @property
    def state(self) -> str:
        """The worst of what was found."""
        return min((finding.state for finding in self.findings), key=STATES.index, default="good")


def entry_of(folder: Path) -> Entry:
    """Returns what a finished folder's manifest tells; nothing is verified.

    Raises:
        UserError: the manifest cannot be read.
    """
    manifest = read_manifest(folder)
    content, about = manifest["content"], manifest["circumstances"]
    return Entry(
        stage=content["stage"],
        kind=content["kind"],
        digest=digest_of(content),
        finished=str(about.get("finished", "")),
        git_commit=str(about.get("git_commit", "")),
        overrides=tuple(about.get("overrides", ())),
        config=content["config"],
        files=content["files"],
        links=links_of(folder, content),
    )


def links_of(folder: Path, content: Mapping[str, Any]) -> tuple[Link, ...]:
    """Returns a folder's parents, those of the same run with the digest that they have now."""
    links = []
    for name, record in content["parents"].items():
        is_beside = record["stage"] == name and name.isidentifier()  # as modules of stages are
        links.append(
            Link(
                name=name,
                kind=record["kind"],
                recorded=record["digest"],
                found=_digest_now(folder.parent / name) if is_beside else "",
                is_beside=is_beside,
            )
        )
    return tuple(links)


def _digest_now(folder: Path) -> str:
    """Returns the digest of a folder's content by its manifest; nothing without one."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, UserError):
        return ""
    return digest_of(manifest["content"]) if _has_content(manifest) else ""


def _has_content(manifest: Any) -> bool:
    return isinstance(manifest, dict) and "content" in manifest


def verify(folder: Path) -> tuple[Entry | None, list[Finding]]:
    """Returns what a folder tells of itself, if it can, and what is wrong with it.

    Nothing is when it is whole and made from its parents as they are now; every digest of every
    file is taken anew. Neither the recipe nor what lies outside the run is looked at.
    """
    if not folder.is_dir():
        return None, [Finding("missing", f"{folder} does not exist")]
    if not (folder / MANIFEST).is_file():
        return None, [Finding("unfinished", f"it has no {MANIFEST}, so the stage did not finish")]
    try:
        entry = entry_of(folder)
    except (UserError, OSError) as error:
        return None, [Finding("altered", str(error))]
    altered = [
        Finding("altered", f"{name} {fault}") for name, fault in faults(folder, entry.files).items()
    ]
    return entry, altered + [
        Finding("stale", f"it was made from another {link.name} than the one beside it now")
        for link in entry.links
        if link.found not in ("", link.recorded)
    ]


def check_parents(parents: Mapping[str, Artifact]) -> None:
    """Raises UserError where a stage's parents were not made from each other."""
    for child in parents.values():
        for name, recorded in child.content["parents"].items():
            if name in parents and parents[name].digest != recorded["digest"]:
                raise UserError(
                    f"{child.path} was made from another {name} than {parents[name].path}. "
                    f"Run: {mending_command(child.path)}"
                )


def check_ancestors(parents: Mapping[str, Artifact]) -> None:
    """Verifies all that a stage's parents were made from, though the stage does not read it itself.

    So a changed byte of any ancestor stops every stage that comes after it. Ancestors that are gone
    stop none; that they could not be verified is said.

    Raises:
        UserError: an ancestor was altered, did not finish, or is not what a parent was made from.
    """
    opened = {parent.path for parent in parents.values()}
    waiting, gone = list(parents.values()), set()
    while waiting:
        child = waiting.pop()
        for link in links_of(child.path, child.content):
            folder = child.path.parent / link.name
            if not link.is_beside:
                continue
            if not folder.is_dir():
                gone.add(str(folder))
                continue
            _check_link(link, child=child.path, folder=folder)
            if folder not in opened:
                opened.add(folder)
                waiting.append(verified(folder, kind=link.kind))
    if gone:
        log.warning("not verified, because it is gone: %s", ", ".join(sorted(gone)))


def _check_link(link: Link, *, child: Path, folder: Path) -> None:
    """Raises UserError unless a finished folder is still the one that its child was made from."""
    if link.found == link.recorded or not (folder / MANIFEST).is_file():
        return
    mend = mending_command(child if link.found else folder)
    raise UserError(
        f"{folder / MANIFEST} is not the one that {child} was made from. Run: {mend} FORCE=1"
    )


def changed_settings(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, defaults: Mapping[str, Any]
) -> list[str]:
    """Returns the settings that differ, as `training.steps: 30 when made, 40 now`.

    Args:
        recorded: configuration in a manifest.
        wanted: what the recipe says now.
        defaults: of the stage; a setting that is newer than the manifest differs from these only.
    """
    before, now = flatten(recorded), flatten(wanted)
    before = {name: value for name, value in flatten(defaults).items() if name in now} | before
    return [
        f"{name}: {before.get(name)} when made, {now.get(name)} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def newer_inputs(folder: Path, inputs: list[Path]) -> list[Path]:
    """Returns the files that make takes for newer than a finished folder."""
    made = (folder / MANIFEST).stat().st_mtime_ns
    return [path for path in inputs if path.is_file() and path.stat().st_mtime_ns > made]


def strangers(folder: Path, entry: Entry) -> list[str]:
    """Returns the names of files in a folder that its manifest does not know."""
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [
        name
        for name in names
        if name not in entry.files
        and name not in UNDIGESTED
        and not name.startswith(f"{CHECKPOINTS}/")
        and not Path(name).name.startswith(".")
    ]
