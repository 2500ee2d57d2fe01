"""The contract of a stage's folder on disk: manifest, lineage, logs and resume points.

A folder is complete when, and only when, it holds a manifest; the manifest is written last and
atomically. Digests and lineage cover the manifest's `content` part only.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.circumstances import circumstances
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.manifest import check_manifest, parse_point
from pipeline.storage import (
    CHECKPOINTS,
    digest_of,
    files_of,
    fsync,
    plain,
    read_json,
    sha256_file,
    write_json,
)
from pipeline.tracking import Tracker, open_tracker

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOGS = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")
KEEP_POINTS = 2


@dataclass(frozen=True)
class Artifact:
    """A finished folder whose files were verified."""

    path: Path
    manifest: dict[str, Any]

    @property
    def content(self) -> dict[str, Any]:
        """The part of the manifest that digests and lineage cover."""
        content: dict[str, Any] = self.manifest["content"]
        return content

    @property
    def kind(self) -> str:
        """dataset, tokenizer, causal-lm, reward or report."""
        return str(self.content["kind"])

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.content["stage"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration it was made with."""
        config: dict[str, Any] = self.content["config"]
        return config

    @property
    def summary(self) -> dict[str, Any]:
        """The headline figures of the stage."""
        summary: dict[str, Any] = self.manifest["circumstances"]["summary"]
        return summary

    @property
    def digest(self) -> str:
        """Digest of the content part: the artifact's identity."""
        return digest_of(self.content)


def open_artifact(path: Path, *, kind: str) -> Artifact:
    """Returns the finished artifact in a folder after verifying the digest of every file.

    Raises:
        UserError: the folder is missing, unfinished, altered, or of another kind; the message
            names the command that mends it.
    """
    path = Path(path)
    mend = _mending_command(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist. Run: {mend}")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} has no {MANIFEST}, so that stage did not finish. Run: {mend}")
    manifest = read_json(path / MANIFEST)
    content = manifest.get("content", {}) if isinstance(manifest, dict) else {}
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path / MANIFEST} is not of format {FORMAT_VERSION}. Run: {mend} FORCE=1")
    check_manifest(manifest, where=path / MANIFEST, mend=f"{mend} FORCE=1")
    if content["kind"] != kind:
        raise UserError(f"{path} is a {content['kind']} folder, but a {kind} folder is needed")
    for name, expected in content["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing. Run: {mend} FORCE=1")
        if file.stat().st_size != expected["size"] or sha256_file(file) != expected["sha256"]:
            raise UserError(f"{file} was altered after the stage finished. Run: {mend} FORCE=1")
    return Artifact(path, manifest)


def foreign_artifact(path: Path, *, kind: str) -> Artifact:
    """Returns a folder or a file from outside the run as a parent: its files are its identity."""
    files = files_of(path) if path.is_dir() else {path.name: {"sha256": sha256_file(path)}}
    content = {"stage": "", "kind": kind, "config": {}, "parents": {}, "files": files}
    return Artifact(path, {"content": content})


@dataclass
class StageRun:
    """A stage at work in its folder; see `begin`."""

    path: Path
    stage: str
    kind: str
    config: StageConfig
    parents: Mapping[str, Artifact]
    key: str
    tracker: Tracker = field(default_factory=Tracker)
    started: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    finished: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return distributed.is_main()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds this stage has worked, interrupted sessions included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row to metrics.jsonl and sends it to the tracker."""
        if self.is_main:
            self._append("metrics.jsonl", [{"step": step, **metrics}])
            self.tracker.log(step, metrics)

    def log_timings(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row to timings.jsonl (clocks, throughput, memory) and sends it on."""
        if self.is_main:
            self._append("timings.jsonl", [{"step": step, **metrics}])
            self.tracker.log(step, metrics)

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl."""
        if self.is_main:
            self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")

    def save_point(self, step: int, write: Callable[[Path], None]) -> None:
        """Publishes a resume point atomically as checkpoints/step-N and drops the oldest ones.

        Args:
            step: number the point is found by.
            write: writes the state's files into the folder it is given; called on every process.
        """
        final = self.path / CHECKPOINTS / f"step-{step}"
        temporary = self.path / CHECKPOINTS / f".step-{step}.tmp"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        write(temporary)
        distributed.barrier()
        if self.is_main:
            self._publish(step, temporary, final)
        distributed.barrier()

    def _publish(self, step: int, temporary: Path, final: Path) -> None:
        files = files_of(temporary)
        write_json(
            temporary / "point.json",
            {
                "step": step,
                "key": self.key,
                "elapsed_seconds": self.elapsed_seconds,
                "logs": {name: _size(self.path / name) for name in LOGS},
                "files": files,
            },
        )
        for name in files:
            fsync(temporary / name)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        fsync(final.parent)
        for old in _points(self.path)[:-KEEP_POINTS]:
            shutil.rmtree(old)

    def latest_point(self) -> tuple[int, Path] | None:
        """Returns step and folder of the newest resume point, or None at a fresh start."""
        points = _points(self.path)
        return (_step_of(points[-1]), points[-1]) if points else None

    def finish(
        self, headline: str, *, chosen: Mapping[str, Any], summary: Mapping[str, Any], card: str
    ) -> None:
        """Completes the artifact: card, digests, and the manifest last; says the closing line.

        Args:
            headline: the stage's result in a few words.
            chosen: what was chosen by measurement, such as the precision.
            summary: headline figures as plain JSON values.
            card: Markdown body of the folder's README.md.
        """
        distributed.barrier()
        if self.is_main:
            (self.path / "README.md").write_text(card.strip() + "\n", encoding="utf-8")
            content = self._content(chosen)
            about = circumstances(seconds=self.elapsed_seconds, config=self.config)
            manifest = {"content": content, "circumstances": {**about, "summary": dict(summary)}}
            write_json(self.path / MANIFEST, manifest)
            log.info("%s: %s -> %s", self.stage, headline, self.path)
        self.finished = True
        distributed.barrier()

    def _content(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "kind": self.kind,
            "config": self.config.content(),
            "parents": {
                name: {"stage": parent.stage, "kind": parent.kind, "digest": parent.digest}
                for name, parent in self.parents.items()
            },
            "seed": self.config.seed,
            "threads": distributed.num_threads(self.config),
            "chosen": dict(chosen),
            "files": files_of(self.path),
        }


@contextlib.contextmanager
def begin(
    config: StageConfig, *, stage: str, kind: str, parents: Mapping[str, Artifact]
) -> Iterator[StageRun]:
    """Yields the stage's folder ready to work in: empty, or at its newest good resume point.

    Raises:
        UpToDate: the folder is finished and newer than its YAML and its parents.
        UserError: the folder was finished with other command-line settings, or two parents do not
            belong together.
    """
    _check_lineage(parents)
    digests = {name: parent.digest for name, parent in parents.items()}
    key = digest_of({"config": config.content(), "parents": digests})
    run = StageRun(config.folder(stage), stage, kind, config, parents, key)
    distributed.on_main(lambda: _open(run))
    try:
        yield run
    except UserError:
        if run.is_main and run.latest_point() is None:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        run.tracker.finish()
    assert run.finished, f"{stage} ended without finish()"


def _open(run: StageRun) -> None:
    """Makes the folder ready to work in; the main process does it for all."""
    _check_finished(run)
    run.path.mkdir(parents=True, exist_ok=True)
    run.earlier_seconds = _prepare(run)
    run.tracker = open_tracker(run.config, stage=run.stage, digest=run.key)


def _check_lineage(parents: Mapping[str, Artifact]) -> None:
    for child in parents.values():
        for name, recorded in child.content["parents"].items():
            if name in parents and parents[name].digest != recorded["digest"]:
                raise UserError(
                    f"{child.path} was made from another {name} than {parents[name].path}. "
                    f"Run: {_mending_command(child.path)}"
                )


def _check_finished(run: StageRun) -> None:
    """Decides about a folder that is already finished: up to date, to be rebuilt, or refused."""
    manifest_path = run.path / MANIFEST
    if run.config.force or not manifest_path.is_file():
        return
    manifest = read_json(manifest_path)
    check_manifest(manifest, where=manifest_path, mend=f"{_mending_command(run.path)} FORCE=1")
    recorded = {"config": manifest["content"]["config"]}
    recorded["parents"] = {k: v["digest"] for k, v in manifest["content"]["parents"].items()}
    before = tuple(manifest["circumstances"].get("overrides", ()))
    wanted = json.loads(json.dumps(run.config.content(), default=plain))
    if recorded["config"] != wanted and before != run.config.overrides:
        raise UserError(
            f"{run.path} is finished with other settings ({_difference(recorded['config'], wanted)}"
            "). Use a recipe or a RUN= of its own, or add FORCE=1 to replace it"
        )
    inputs = [Path("configs") / run.config.recipe / f"{run.stage}.yaml"]
    inputs += [parent.path / MANIFEST for parent in run.parents.values()]
    made = manifest_path.stat().st_mtime_ns
    older = all(not p.is_file() or p.stat().st_mtime_ns <= made for p in inputs)
    if digest_of(recorded) == run.key and older:
        raise UpToDate(f"{run.path} is up to date")


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> str:
    """Returns the settings that differ, as `key: old there, new here`."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(_difference(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name}: {old} there, {new} here")
    return "; ".join(text for text in found if text)


def _prepare(run: StageRun) -> float:
    """Brings the folder back to its newest good point, or empties it; returns its seconds."""
    rebuild = run.config.force or (run.path / MANIFEST).is_file()
    (run.path / MANIFEST).unlink(missing_ok=True)
    point = None if rebuild else _newest_good_point(run)
    if point is None:
        for entry in run.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return 0.0
    for name in LOGS:
        if (run.path / name).is_file():
            os.truncate(run.path / name, point["logs"].get(name, 0))
    log.info("%s: goes on from step %d of %s", run.stage, point["step"], run.path)
    return float(point["elapsed_seconds"])


def _newest_good_point(run: StageRun) -> dict[str, Any] | None:
    """Returns the newest resume point that verifies; removes every newer one, saying why."""
    for folder in reversed(_points(run.path)):
        reason = _fault_of(folder, run.key)
        if reason is None:
            point: dict[str, Any] = read_json(folder / "point.json")
            return point
        log.warning("%s: resume point %s is not used: %s", run.stage, folder, reason)
        shutil.rmtree(folder)
    return None


def _fault_of(folder: Path, key: str) -> str | None:
    """Returns what is wrong with a resume point, or None."""
    try:
        point = parse_point(folder)
    except (OSError, UserError) as error:
        return str(error)
    if point["key"] != key:
        return "it belongs to another configuration or other parents"
    if files_of(folder) != point["files"]:
        return "a file is missing, damaged or foreign"
    if any(_size(folder.parent.parent / name) < point["logs"].get(name, 0) for name in LOGS):
        return "a log has become shorter than it was when the point was saved"
    return None


def _points(path: Path) -> list[Path]:
    found = (path / CHECKPOINTS).glob("step-*") if (path / CHECKPOINTS).is_dir() else ()
    return sorted((point for point in found if _is_point(point)), key=_step_of)


def _is_point(folder: Path) -> bool:
    return folder.is_dir() and folder.name.removeprefix("step-").isdecimal()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _mending_command(path: Path) -> str:
    recipe = path.parent.name
    if path.parent.parent.name == "runs" and (Path("configs") / recipe).is_dir():
        return f"make {path.name} RECIPE={recipe}"
    return f"make {path.name} RUN={path.parent}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
