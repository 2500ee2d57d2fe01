"""What each experiment tracker is told: the only module that knows wandb, trackio, TensorBoard.

All of them are Accelerate's tracker classes; here stand the run's name and group, tables, files,
and what a user does with the result.
"""

import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipeline.errors import UserError, first_line, told
from pipeline.storage import flatten

log = logging.getLogger(__name__)

PROJECT = "rlhf-pipeline"
TABLE = "samples"
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
FORMER_HOSTS = {"api.forge.coreweave.com": "api.wandb.ai"}
"""wandb's own server, and the name by which older netrc files know it."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A stage as a run of a tracker."""

    id: str
    """The same for every session of it."""
    name: str
    group: str
    stage: str
    folder: Path
    """Folder of the whole run; what trackers write lies below it."""
    config: dict[str, Any]
    """Settings, and the digests of the parents."""
    goes_on: bool
    """Whether an earlier session has begun it."""

    @property
    def project(self) -> str:
        """Name of the project, or what WANDB_PROJECT says."""
        return os.environ.get("WANDB_PROJECT", PROJECT)


class Board(Protocol):
    """A tracker's run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one row of metrics."""

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows with texts."""

    def attach(self, manifest: Path, summary: Mapping[str, Any]) -> None:
        """Takes the finished stage's manifest and headline figures."""

    def finish(self) -> str:
        """Ends the run; returns what the user can do now, or nothing."""


class WandB:
    """Weights & Biases: online where a key is configured, else offline.

    Rows carry their step as a metric of its own: wandb's own counter only rises, and a session that
    goes on would lose what belongs to a step that was sent before.
    """

    def __init__(self, run: TrackedRun, *, must: bool) -> None:
        """Takes whether a server that does not answer stops the stage.

        Raises:
            UserError: it does.
        """
        import wandb
        from accelerate.tracking import WandBTracker

        if "WANDB_MODE" not in os.environ and not key_is_configured():
            os.environ["WANDB_MODE"] = "offline"
        (run.folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._tracker = WandBTracker(
            run_name=run.project,
            name=run.name,
            group=run.group,
            job_type=run.stage,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            # No git: of a remote's address, wandb would write the name, where a token may stand.
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        try:
            self._tracker.start()
        except wandb.Error as error:
            _go_offline(error, must=must)
            self._tracker.start()
        self._tracker.store_init_configuration(run.config)
        self._tracker.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one row of metrics."""
        self._tracker.log({"step": step, **metrics})

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows with texts as a wandb.Table."""
        import wandb

        columns, data = _table(rows)
        self._tracker.log({"step": step, TABLE: wandb.Table(columns=columns, data=data)})

    def attach(self, manifest: Path, summary: Mapping[str, Any]) -> None:
        """Saves the manifest among the run's files; figures go to its summary."""
        run = self._tracker.run
        copied = shutil.copy(manifest, run.dir)
        run.save(copied, base_path=run.dir, policy="now")
        run.summary.update(flatten(summary))

    def finish(self) -> str:
        """Ends the run; when it was offline, returns how to upload all of its sessions."""
        run = self._tracker.run
        offline, folder = run.offline, Path(run.dir).parents[1]
        self._tracker.finish()
        upload = f"{_program('wandb')} sync {shlex.quote(str(folder))}/*-{run.id}"
        return f"wandb was offline; to upload this run: {upload}" if offline else ""


class Trackio:
    """trackio: a local database, in the run's folder unless TRACKIO_DIR says otherwise."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / "trackio").absolute()))
        from accelerate.tracking import TrackioTracker

        self._project, self._artifact = run.project, f"{run.id}-manifest"
        self._tracker = TrackioTracker(
            run.project,
            name=f"{run.name} {run.id}",  # which names a run there, for good
            group=run.group,
            resume="allow",
            config=run.config,
            private=True,  # where TRACKIO_SPACE_ID sends it to a hub
            embed=False,
        )
        with _quiet():
            self._tracker.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one row of metrics."""
        self._tracker.log(dict(metrics), step=step)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows with texts as a trackio.Table."""
        import trackio

        columns, data = _table(rows)
        self._tracker.log({TABLE: trackio.Table(columns=columns, data=data)}, step=step)

    def attach(self, manifest: Path, summary: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Saves the manifest as an artifact of the run; it holds the figures too."""
        with _quiet():
            self._tracker.run.log_artifact(str(manifest), name=self._artifact, type="manifest")

    def finish(self) -> str:
        """Ends the run; returns how to look at it."""
        import trackio

        with _quiet():
            self._tracker.finish()
            trackio.finish()  # else it ends the run once more when the process does, and prints
        show = f"{_program('trackio')} show --project {shlex.quote(self._project)}"
        return f"to see it: TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} {show}"


class TensorBoard:
    """TensorBoard: event files below the run's folder, one folder for all sessions of a stage."""

    def __init__(self, run: TrackedRun) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._folder = run.folder / "tensorboard"
        self._tracker = TensorBoardTracker(run.id, logging_dir=str(self._folder))
        self._tracker.start()
        if not run.goes_on:
            self._tracker.store_init_configuration(_hyperparameters(run.config))
            self._tracker.log({"group": run.group, "config": _code(run.config)}, step=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one row of metrics."""
        self._tracker.log(dict(metrics), step=step)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows with texts as a table in Markdown."""
        columns, data = _table(rows)
        lines = [columns, ["---"] * len(columns), *([_cell(one) for one in row] for row in data)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._tracker.log({TABLE: text}, step=step)

    def attach(self, manifest: Path, summary: Mapping[str, Any]) -> None:
        """Takes the manifest and the figures as texts."""
        texts = {"manifest": _code(json.loads(manifest.read_text(encoding="utf-8")))}
        self._tracker.log({**texts, "summary": _code(summary)}, step=0)

    def finish(self) -> str:
        """Ends the run; returns how to look at it."""
        self._tracker.finish()
        return f"to see it: {_program('tensorboard')} --logdir {shlex.quote(str(self._folder))}"


BOARDS: dict[str, Callable[[TrackedRun], Board]] = {
    "auto": lambda run: WandB(run, must=False),
    "wandb": lambda run: WandB(run, must=True),
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}
"""Trackers by the names of the setting `tracking`."""


def key_is_configured() -> bool:
    """Returns whether Weights & Biases finds a key: by the environment, its settings or netrc.

    wandb itself says so (`wandb.login`) only once its session has read the environment for good.

    Raises:
        UserError: WANDB_BASE_URL is no server's address.
    """
    import netrc

    settings = _settings()
    if settings.api_key or any(os.environ.get(name) for name in CREDENTIALS):
        return True
    host = urlsplit(settings.base_url).netloc
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    entry = known.authenticators(host) or known.authenticators(FORMER_HOSTS.get(host, host))
    return bool(entry and entry[2])


def _settings() -> Any:
    """Returns what wandb's files of settings say, and which server the environment names."""
    import wandb

    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = wandb.Settings(silent=True, settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    if server := os.environ.get("WANDB_BASE_URL"):
        with told("WANDB_BASE_URL is no address of a server"):
            settings.base_url = server
    return settings


def _go_offline(error: Exception, *, must: bool) -> None:
    """Turns wandb offline where it may be; the key is no part of what wandb says."""
    if must or os.environ.get("WANDB_MODE") == "offline":
        raise UserError(
            f"wandb did not start ({first_line(error)}). Set WANDB_MODE=offline, or use "
            "--tracking=auto, which goes on offline by itself"
        ) from error
    log.warning("wandb did not start (%s): it goes on offline", first_line(error))
    import wandb

    wandb.teardown()  # its session holds the run's id, and read the environment when it began
    os.environ["WANDB_MODE"] = "offline"


def _program(name: str) -> str:
    """Returns what a shell calls a tracker's program by, also where no venv is activated."""
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns columns and cells of rows; a column holds texts or numbers, as trackers want it."""
    flat = [flatten(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    texts = {name for row in flat for name, value in row.items() if not _is_number(value)}
    data = [
        [_text(row.get(name)) if name in texts else row.get(name) for name in columns]
        for row in flat
    ]
    return columns, data


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> str:
    """Returns a value as one cell of a table in Markdown, where its signs mean nothing."""
    text = f"{value:.4g}" if isinstance(value, float) else _text(value)
    escaped = "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-.!|<>~$" else sign for sign in text)
    return " ".join(escaped.split())


def _code(value: Any) -> str:
    """Returns a value as a block of code in Markdown."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as TensorBoard takes them: flat, texts for what is no number."""
    return {
        name: value if isinstance(value, bool) or (_is_number(value) and value is not None)
        else _text(value)
        for name, value in flatten(config).items()
    }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what trackio prints from the terminal, on which a progress bar may stand."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
