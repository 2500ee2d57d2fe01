"""Prints what a run was made from, from the data sets to the report, and whether it still is.

Reads   every folder of runs/<recipe>, each digest of each file; configs/<recipe>; and models from
        outside the run where the settings name them.
Writes  to the terminal only. The exit code is 0 when all is good, 1 when something is missing,
        unfinished, altered or stale, and 2 for a mistake in the command itself.
Run     make lineage RECIPE=cpu
        python -m stages.lineage --recipe=cpu --run=a/copy/of/it --json
"""

import argparse
import dataclasses
import importlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.checkpoint import foreign_artifact
from pipeline.command import INTERRUPTED, USER_MISTAKE, Parser
from pipeline.config import StageConfig, load, overrides, require
from pipeline.errors import UserError
from pipeline.lineage import (
    Entry,
    Finding,
    Link,
    Row,
    changed_settings,
    newer_inputs,
    strangers,
    verify,
)
from pipeline.manifest import MANIFEST, OPTIONAL, STAGES
from pipeline.origin import pinned
from pipeline.reporting.chain import chain_text, some
from pipeline.storage import plain, read_json

HARMLESS = re.compile(r"[\w .,:=+/\[\]-]+")
"""Words that may be pasted into a shell: a manifest is not trusted to hold no others."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is looked at, and how it is told."""

    recipe: str = "cpu"
    """Recipe: the folder below configs/ that the run is held against."""
    run: str = ""
    """Run folder; runs/<recipe> when empty."""
    as_json: bool = False
    """JSON in place of text."""

    def __post_init__(self) -> None:
        recipes = sorted(path.parent.name for path in Path("configs").glob("*/data.yaml"))
        known = ", ".join(recipes) or "none"
        require(self.recipe in recipes, f"no recipe configs/{self.recipe}; recipes here: {known}")
        require(
            self.run_dir.is_dir(), f"{self.run_dir} does not exist. Run: make {self.make_words}"
        )

    @property
    def run_dir(self) -> Path:
        """Folder that holds one subfolder per stage."""
        return Path(self.run or f"runs/{self.recipe}")

    @property
    def make_words(self) -> str:
        """What tells make of this recipe and this run."""
        is_usual = self.run_dir == Path(f"runs/{self.recipe}")
        return f"RECIPE={self.recipe}" + ("" if is_usual else f" RUN={self.run_dir}")


def stage_config(config: Config, row: Row, entry: Entry) -> tuple[StageConfig, StageConfig]:
    """Returns what the recipe and the words of that time say of a stage now, and its defaults.

    The stage's module is looked up by its name, as make does: stages know nothing of each other.

    Raises:
        UserError: the recipe's YAML does not fit the stage.
    """
    kind = importlib.import_module(f"stages.{row.stage}").Config
    words = [f"--recipe={config.recipe}", f"--run={config.run_dir}"]
    words += flags(entry)
    return load(kind, words, stage=row.stage), kind()


def flags(entry: Entry | None) -> list[str]:
    """Returns the words on the command line that a folder was made with."""
    recorded = entry.overrides if entry else ()
    return [f"--{word}" for word in overrides([f"--{word}" for word in recorded])]


def hold_against_recipe(config: Config, row: Row, entry: Entry) -> None:
    """Adds what the recipe and the disk outside the run say by now."""
    yaml = Path("configs") / config.recipe / f"{row.stage}.yaml"
    if not yaml.is_file():
        return
    if newer_inputs(config.run_dir / row.stage, [yaml]):
        row.findings.append(Finding("stale", f"{yaml} is newer than it, as make sees it"))
    try:
        wanted, defaults = stage_config(config, row, entry)
        now, before = plain_json(wanted.content()), plain_json(defaults.content())
        outside = wanted.outside(row.stage)
    except UserError as error:
        row.notes.append(f"not held against {yaml}: {error}")
        return
    if changed := changed_settings(entry.config, now, defaults=before):
        row.findings.append(Finding("stale", f"settings differ from {yaml}: {some(changed)}"))
    row.entry = dataclasses.replace(entry, links=tuple(looked_up(entry.links, outside)))
    row.findings += [
        Finding("stale", f"{outside[link.name]}, which it was made from, has changed since")
        for link in row.entry.links
        if link.name in outside and link.found != link.recorded
    ]


def looked_up(links: Sequence[Link], outside: Mapping[str, Path]) -> Iterator[Link]:
    """Yields the links, those to what lies outside the run with the digest it has now."""
    for link in links:
        path = outside.get(link.name)
        found = foreign_artifact(path, kind=link.kind).digest if path else link.found
        yield dataclasses.replace(link, found=found)


def hold_against_parents(config: Config, row: Row, entry: Entry, parents: Sequence[Row]) -> None:
    """Adds what the folders beside it mean for a folder: those that make would make anew."""
    for parent in parents:
        states = [one.state for one in parent.findings if one.state != "altered"]
        if states and parent.stage in [link.name for link in entry.links]:
            row.findings.append(Finding("stale", f"its parent {parent.stage} is {states[0]}"))
    beside = [config.run_dir / link.name / MANIFEST for link in entry.links if link.is_beside]
    newer = newer_inputs(config.run_dir / row.stage, beside)
    if newer and not row.findings:
        names = ", ".join(path.parent.name for path in newer)
        row.notes.append(f"make would run it again, because {names} is newer by the file's time")


def examine(config: Config) -> list[Row]:
    """Returns a row for every stage of the run, parents first."""
    rows: list[Row] = []
    for stage in STAGES:
        folder = config.run_dir / stage
        if stage in OPTIONAL and not folder.is_dir():
            continue
        entry, findings = verify(folder)
        row = Row(stage=stage, entry=entry, findings=findings)
        if entry is not None:
            hold_against_recipe(config, row, entry)
            hold_against_parents(config, row, entry, rows)
            if unknown := strangers(folder, entry):
                row.notes.append(f"files that the stage did not make: {some(unknown)}")
        rows.append(row)
    return rows


def plain_json(value: Any) -> Any:
    """Returns a value as it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=plain))


def sources(config: Config, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns where everything came from: the data's ledger, then models that lie elsewhere."""
    found: list[dict[str, Any]] = []
    for row in rows:
        ledger = config.run_dir / row.stage / "sources.json"
        if row.entry and "sources.json" in row.entry.files and row.state != "altered":
            keys = ("origin", "version", "licence", "sha256")
            found += [{key: one.get(key, "") for key in keys} for one in read_json(ledger)]
        origin = row.entry.config.get("init_from") if row.entry else None
        local = row.entry and any(link.name == f"{row.stage}/init_from" for link in row.entry.links)
        if origin and not local and origin not in [one["origin"] for one in found]:
            package = pinned(origin)
            found.append(
                {
                    "origin": origin,
                    "version": package.version if package else "",
                    "licence": package.licence if package else "",
                    "sha256": package.sha256 if package else "",
                }
            )
    return found


def mending(config: Config, rows: Sequence[Row]) -> list[str]:
    """Returns the commands that make everything good again.

    What was altered or is stale is forced, in the words it was made with unless a shell would make
    something of them; what did not finish must not be, or it would begin anew.
    """
    commands = []
    forced = [row for row in rows if row.state in ("altered", "stale")]
    for words, group in groupby(forced, lambda row: " ".join(flags(row.entry))):
        args = f' ARGS="{words}"' if HARMLESS.fullmatch(words) else ""
        names = " ".join(row.stage for row in group)
        commands.append(f"make {names} {config.make_words} FORCE=1{args}")
    rest = " ".join(row.stage for row in rows if row.state in ("missing", "unfinished"))
    return commands + ([f"make {rest} {config.make_words}"] if rest else [])


def as_json(
    config: Config,
    rows: Sequence[Row],
    *,
    found: Sequence[Mapping[str, Any]],
    commands: Sequence[str],
) -> str:
    """Returns everything as JSON: the chain, its sources, and the commands that mend it."""
    folders = [
        {
            "stage": row.stage,
            "state": row.state,
            "findings": [dataclasses.asdict(finding) for finding in row.findings],
            "notes": row.notes,
            "manifest": row.entry and dataclasses.asdict(row.entry),
        }
        for row in rows
    ]
    told = {"run": str(config.run_dir), "recipe": config.recipe, "folders": folders}
    told |= {"sources": found, "mend": commands}
    return json.dumps(told, indent=1, ensure_ascii=False)


def parse(argv: Sequence[str] | None) -> Config:
    """Returns the configuration of a command line."""
    parser = Parser(
        prog="python -m stages.lineage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="cpu", help="recipe the run is held against (cpu)")
    parser.add_argument("--run", default="", help="run folder (runs/<recipe>)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="JSON in place of text")
    return Config(**vars(parser.parse_args(argv)))


def run(config: Config) -> int:
    """Prints the chain; returns 0 when all of it is good, else 1."""
    rows = examine(config)
    found, commands = sources(config, rows), mending(config, rows)
    title = f"Lineage of {config.run_dir}, held against configs/{config.recipe}"
    if config.as_json:
        told = as_json(config, rows, found=found, commands=commands)
    else:
        told = chain_text(title, sources=found, rows=rows, commands=commands)
    sys.stdout.write(told + "\n")
    return int(any(row.state != "good" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return run(parse(argv))
    except UserError as error:
        logging.getLogger("stages.lineage").error("lineage: %s", error)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
