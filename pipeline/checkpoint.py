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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline import distributed
from pipeline.circumstances import Usage, circumstances
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.former import bring_back, former_of, put_aside, undone_on_failure
from pipeline.lock import Lock
from pipeline.manifest import FORMAT_VERSION, MANIFEST, mending_command, read_manifest
from pipeline.points import LOGS, Points, differences, log_sizes
from pipeline.saving import saving_of
from pipeline.stopping import STOPPED, Stopped
from pipeline.storage import (
    digest_of,
    files_of,
    inside,
    plain,
    require_space,
    sealed,
    settle,
    sha256_file,
    telling_disk_trouble,
    write_json,
)
from pipeline.tracking import Tracker, open_tracker, rows_in

log = logging.getLogger(__name__)

C = TypeVar("C", bound=StageConfig)

POINT_COPIES = 3
"""Copies of the moved weights in a resume point: themselves and the optimizer's two moments."""


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

    The main process verifies it for all, and every process must call it.

    Raises:
        UserError: the folder is missing, unfinished, altered, or of another kind; the message
            names the command that mends it.
    """
    return distributed.on_main(lambda: verified(Path(path), kind=kind))


def verified(path: Path, *, kind: str) -> Artifact:
    """Returns what `open_artifact` does, for this process alone."""
    mend = mending_command(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist. Run: {mend}")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} has no {MANIFEST}, so that stage did not finish. Run: {mend}")
    manifest = read_manifest(path)
    content = manifest["content"]
    if content["kind"] != kind:
        raise UserError(f"{path} is a {content['kind']} folder, but a {kind} folder is needed")
    for name, expected in content["files"].items():
        file = inside(path, name)
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
    points: Points
    lock: Lock
    tracker: Tracker = field(default_factory=Tracker)
    started: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    total_steps: int = 0
    """Steps the stage will take in all; 0 where it does not count them."""
    usage: Usage = field(default_factory=Usage)
    finished: bool = False

    @property
    def key(self) -> str:
        """Digest of the configuration and the parents: what a resume point must agree with."""
        return str(self.points.identity["key"])

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
        """Appends one row to timings.jsonl (clocks, throughput, the machine) and sends it on."""
        if self.is_main:
            row = {**metrics, **self.usage.since_last()}
            place = {"step": step, "of": self.total_steps, "at": round(time.time(), 3)}
            self._append("timings.jsonl", [{**place, **row}])
            self.tracker.log(step, row, name="timings.jsonl")

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl and sends them as a table."""
        if self.is_main:
            told = list(rows)
            self._append("samples.jsonl", [{"step": step, **row} for row in told])
            self.tracker.table(step, told)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")

    def save_point(self, step: int, write: Callable[[Path], None]) -> float:
        """Returns the seconds it took to write a resume point, published while the stage goes on.

        Args:
            step: number the point is found by.
            write: writes the state's files into the folder it is given; called on every process.
        """
        begun = self.elapsed_seconds
        self.points.save(step, write, seconds=begun)
        return self.elapsed_seconds - begun

    def latest_point(self) -> tuple[int, Path] | None:
        """Returns step and folder of the newest resume point, the same for all processes."""
        return distributed.on_main(self.points.latest)

    def resolved(self, config: C) -> C:
        """Returns the configuration with the precision that `auto` stands for.

        Args:
            config: with a precision, or with a group `training` that has one.
        """
        from pipeline.models import choose_precision

        training: Any = getattr(config, "training", None)
        holder: Any = training or config
        chosen = self.points.choose("precision", holder.precision, lambda: choose_precision("auto"))
        holder = replace(holder, precision=chosen)
        changed = {"training": holder} if training else {"precision": chosen}
        return replace(config, **changed)

    def require_space(self, moved: int, whole: int) -> None:
        """Checks that the disk has room for the resume points and the result, before training.

        Args:
            moved: bytes of the weights that training moves; a point holds them and two moments.
            whole: bytes of the weights that the result holds.

        Raises:
            UserError: it has not.
        """
        if self.is_main:
            points = POINT_COPIES * moved * (self.points.keep + 1)
            there = sum(f.stat().st_size for p in self.points.found() for f in p.iterdir())
            what = f"{self.points.keep} resume points, one in the making, and the model"
            require_space(self.path, max(0, points - there) + whole, what=what)

    def stop(self, step: int, reason: str) -> NoReturn:
        """Ends the stage before its work is done, when its last resume point is published.

        Raises:
            Stopped: always.
        """
        self.points.wait()
        distributed.barrier()
        distributed.leave(STOPPED)
        raise Stopped(
            f"{reason}: stopped after step {step}, which is saved; the same command goes on"
        )

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
            self.points.wait()
            (self.path / "README.md").write_text(card.strip() + "\n", encoding="utf-8")
            content = self._content(chosen)
            settle(self.path, content["files"])
            about = circumstances(seconds=self.elapsed_seconds, config=self.config)
            manifest = {"content": content, "circumstances": {**about, "summary": dict(summary)}}
            write_json(self.path / MANIFEST, sealed(manifest))
            self.tracker.attach(self.path / MANIFEST, dict(summary))
            shutil.rmtree(former_of(self.path), ignore_errors=True)
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
    from pipeline.lineage import check_ancestors, check_parents  # which open artifacts themselves

    check_parents(parents)
    distributed.on_main(lambda: check_ancestors(parents))
    run = _stage_run(config, stage=stage, kind=kind, parents=parents)
    distributed.on_main(lambda: _open(run))
    try:
        with undone_on_failure(run.points), telling_disk_trouble(run.path):
            yield run
    finally:
        run.tracker.finish()
        run.points.close()
        run.lock.release()
    assert run.finished, f"{stage} ended without finish()"


def _stage_run(
    config: StageConfig, *, stage: str, kind: str, parents: Mapping[str, Artifact]
) -> StageRun:
    made_of = {
        "config": json.loads(json.dumps(config.content(), default=plain)),
        "parents": {name: parent.digest for name, parent in parents.items()},
    }
    folder, identity = config.folder(stage), {"key": digest_of(made_of), **made_of}
    return StageRun(
        folder,
        stage,
        kind,
        config,
        parents,
        points=Points(stage, folder, identity, keep=saving_of(config).keep),
        lock=Lock(folder.with_name(f".{stage}.lock")),
    )


def _open(run: StageRun) -> None:
    """Makes the folder ready to work in; the main process does it for all."""
    run.lock.acquire()
    try:
        bring_back(run.points)
        _check_finished(run)
        what = f"the files of {run.stage}"
        require_space(run.path.resolve().parent, run.config.room, what=what)
        with undone_on_failure(run.points):
            before = {name: rows_in(run.path / name) for name in LOGS}
            run.earlier_seconds = _prepare(run)
            run.tracker = _track(run, before if run.points.latest() else None)
    except BaseException:
        run.lock.release()
        raise


def _track(run: StageRun, before: Mapping[str, int] | None) -> Tracker:
    parents: dict[str, str] = run.points.identity["parents"]
    return open_tracker(run.config, stage=run.stage, key=run.key, parents=parents, before=before)


def _check_finished(run: StageRun) -> None:
    """Decides about a folder that is already finished: up to date, to be rebuilt, or refused."""
    manifest_path = run.path / MANIFEST
    if run.config.force or not manifest_path.is_file():
        return
    manifest = read_manifest(run.path)
    recorded = {"config": manifest["content"]["config"]}
    recorded["parents"] = {k: v["digest"] for k, v in manifest["content"]["parents"].items()}
    before = tuple(manifest["circumstances"].get("overrides", ()))
    wanted = json.loads(json.dumps(run.config.content(), default=plain))
    if recorded["config"] != wanted and before != run.config.overrides:
        raise UserError(
            f"{run.path} is finished with other settings ({differences(recorded['config'], wanted)}"
            "). Use a recipe or a RUN= of its own, or add FORCE=1 to replace it"
        )
    inputs = [Path("configs") / run.config.recipe / f"{run.stage}.yaml"]
    inputs += [parent.path / MANIFEST for parent in run.parents.values()]
    made = manifest_path.stat().st_mtime_ns
    older = all(not p.is_file() or p.stat().st_mtime_ns <= made for p in inputs)
    if digest_of(recorded) == run.key and older:
        raise UpToDate(f"{run.path} is up to date")


def _prepare(run: StageRun) -> float:
    """Brings the folder back to its newest good point, or empties it; returns its seconds."""
    put_aside(run.path)
    folder = run.path.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    point = None if run.config.force else run.points.newest_good()
    if point is None:
        for entry in folder.iterdir():
            is_own = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_own else entry.unlink()
        return 0.0
    for name, size in log_sizes(point).items():
        if (folder / name).is_file():
            os.truncate(folder / name, size)
    log.info("%s: goes on from step %d of %s", run.stage, point["step"], run.path)
    return float(point["elapsed_seconds"])
