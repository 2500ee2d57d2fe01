"""Experiment trackers beside metrics.jsonl: which of them, and that a run continues.

A stage is one run of a tracker however often it is interrupted. Which rows were sent stands in a
file beside its lock, as they do again, to the same figures, what came after the resume point.
"""

import importlib.util
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TRACKERS, StageConfig
from pipeline.errors import UserError, installing
from pipeline.points import LOGS
from pipeline.shapes import each, holds, is_text, is_whole, mapping
from pipeline.storage import read_json, write_json

if TYPE_CHECKING:
    from pipeline.trackers import Board

log = logging.getLogger(__name__)

UNTRACKED = ("data", "tokenizer", "report", "seeds")
"""Stages that learn and measure nothing: a tracker would only cost them seconds of start-up."""
RECORD = mapping({"id": holds(is_text), "key": holds(is_text), "sent": each(holds(is_whole))})
"""What is noted of a stage's tracked run."""


class Tracker:
    """Sends what a stage logs to its trackers, or nowhere; no row is sent twice."""

    def __init__(
        self, boards: Sequence["Board"] = (), *, sent: Mapping[str, int] | None = None
    ) -> None:
        """Takes how many of the next rows of each log were sent before."""
        self._boards, self._left = boards, dict(sent or {})

    def log(self, step: int, metrics: Mapping[str, float], *, name: str = "metrics.jsonl") -> None:
        """Sends a row of a log."""
        if self._new(name, [metrics]):
            for board in self._boards:
                board.log(step, metrics)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows of samples.jsonl."""
        if new := self._new("samples.jsonl", rows):
            for board in self._boards:
                board.table(step, new)

    def _new(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Returns the rows that were not sent before."""
        known = min(self._left.get(name, 0), len(rows))
        if known:
            self._left[name] -= known
        return rows[known:]

    def attach(self, manifest: Path, summary: Mapping[str, Any]) -> None:
        """Sends a finished stage's manifest and headline figures."""
        for board in self._boards:
            board.attach(manifest, summary)

    def finish(self) -> None:
        """Ends the trackers' runs and says what can be done with them."""
        for board in self._boards:
            if line := board.finish():
                log.info("%s", line)
        self._boards = ()


def open_tracker(
    config: StageConfig,
    *,
    stage: str,
    key: str,
    parents: Mapping[str, str],
    before: Mapping[str, int] | None = None,
) -> Tracker:
    """Returns the configured trackers of a stage. Call it after `distributed.setup`.

    Args:
        config: the stage's.
        stage: its name.
        key: digest of its configuration and parents.
        parents: their digests by name.
        before: rows of each log when the session began, where it goes on; None at a fresh start.

    Raises:
        UserError: a tracker is not installed, or did not start.
    """
    if stage in UNTRACKED or not config.trackers:
        return Tracker()
    for name in config.trackers:
        _require_installed(name)
    from pipeline.trackers import BOARDS, TrackedRun

    folder = config.run_dir
    record, goes_on = _record(folder, stage=stage, key=key, before=before)
    run = TrackedRun(
        id=record["id"],
        name=f"{folder.name}-{stage}",
        group=f"{config.recipe}-{(parents.get('data') or key)[:8]}",
        stage=stage,
        folder=folder,
        config={**config.content(), "recipe": config.recipe, "parents": dict(parents)},
        goes_on=goes_on,
    )
    boards = [BOARDS[name](run) for name in config.trackers]
    left = {name: record["sent"].get(name, 0) - rows_in(folder / stage / name) for name in LOGS}
    return Tracker(boards, sent={name: max(0, rows) for name, rows in left.items()})


def _record(
    folder: Path, *, stage: str, key: str, before: Mapping[str, int] | None
) -> tuple[dict[str, Any], bool]:
    """Returns id and rows sent of a stage's tracked run, and whether a former session began it."""
    path = folder / f".{stage}.tracked.json"
    found = _read(path) if before is not None else None
    goes_on = found is not None and found["key"] == key
    record = found if found is not None and goes_on else _new_record(stage, key)
    if goes_on and before is not None:
        sent = {name: max(record["sent"].get(name, 0), rows) for name, rows in before.items()}
        record = {**record, "sent": sent}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record, goes_on


def _new_record(stage: str, key: str) -> dict[str, Any]:
    return {"id": f"{stage}-{key[:8]}-{secrets.token_hex(4)}", "key": key, "sent": {}}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: Any = read_json(path)
    except (OSError, UserError):
        return None
    return record if RECORD(record) is None else None


def rows_in(path: Path) -> int:
    """Returns the whole rows of a log; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _require_installed(name: str) -> None:
    module = TRACKERS[name]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"tracking: {module} is not installed. Run: {installing(module)}")
