"""One trial: a stage struck, run again until it is done, and compared with the straight run."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.crash.chain import Chain, points
from benchmarks.crash.compare import MANIFEST, differences
from benchmarks.crash.moments import Strike, Trial
from benchmarks.crash.session import Session, run


@dataclass(frozen=True)
class Kill:
    """A strike that ended a session.

    Attributes:
        strike: what was planned.
        ended_by: exit code or signal, as make tells it.
        at: the last change that the stage was about to make, or had made; "start-up" for none.
        lost_seconds: of work since the newest resume point, or since the session's start.
        resumed_from: step from which the next session went on; None when it began anew.
    """

    strike: Strike
    ended_by: str
    at: str
    lost_seconds: float
    resumed_from: int | None


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        trial: what was planned.
        kills: the strikes that ended a session; one that came too late is none, and the last.
        differences: what is not as in the straight run; empty is what is hoped for.
        seconds: of all sessions.
    """

    trial: Trial
    kills: tuple[Kill, ...]
    differences: tuple[str, ...]
    seconds: float

    @property
    def missed(self) -> str:
        """The moment of the strike that came too late, or nothing."""
        late = self.trial.strikes[len(self.kills) :]
        return late[0].moment if late else ""

    @property
    def survived(self) -> tuple[Kill, ...]:
        """The kills, where the trial ended as the straight run did."""
        return () if self.differences else self.kills


def conduct(trial: Trial, straight: Chain, folder: Path) -> Outcome:
    """Returns what a trial found; its folder stays where something differs."""
    shutil.rmtree(folder, ignore_errors=True)
    chain = straight.copy_parents(trial.stage, folder / straight.run.name)
    stage_folder = chain.folder(trial.stage)
    attempts: list[Attempt] = []
    for strike in (*trial.strikes, None):
        attempts.append(_attempt(chain, trial.stage, strike))
        if attempts[-1].session.code == 0:
            break
    found = [line for attempt in attempts for line in attempt.ignored_points()]
    if attempts[-1].session.code == 0:
        found += differences(stage_folder, straight.folder(trial.stage))
    else:
        found.append(f"not finished: {_last_line(attempts[-1].session.output)}")
    _keep_or_remove(folder, attempts, keep=bool(found))
    seconds = sum(attempt.session.seconds for attempt in attempts)
    return Outcome(trial, tuple(_kills(attempts)), tuple(found), seconds)


@dataclass(frozen=True)
class Attempt:
    """A session of a trial and what lay in the folder before and after.

    Attributes:
        strike: what was planned for it.
        session: how it went.
        point: step of the newest resume point when it began; None without one, or when the stage
            was finished.
        kept_until: when the newest work was kept that is left: seconds since the epoch.
    """

    strike: Strike | None
    session: Session
    point: int | None
    kept_until: float

    def ignored_points(self) -> list[str]:
        """Returns a line where the session worked, but not from the newest resume point."""
        worked = any(change == "open metrics.jsonl" for _, change in self.session.changes)
        if not worked or self.point is None or self.session.resumed_from == self.point:
            return []
        return [f"went on from {self.session.resumed_from} though there was step-{self.point}"]


def _attempt(chain: Chain, stage: str, strike: Strike | None) -> Attempt:
    folder = chain.folder(stage)
    lying = points(folder)
    finished = (folder / MANIFEST).is_file()
    point = int(lying[-1].name.removeprefix("step-")) if lying and not finished else None
    session = run(chain, stage, strike)
    kept = [path / "point.json" for path in points(folder)] + [folder / MANIFEST]
    times = [path.stat().st_mtime for path in kept if path.is_file()]
    return Attempt(strike, session, point, max([session.started, *times]))


def _kills(attempts: list[Attempt]) -> Iterator[Kill]:
    """Yields the strikes that ended a session, with what the next session made of it."""
    for attempt, following in pairwise(attempts):
        if attempt.strike is None or attempt.session.struck is None:
            continue
        changes = attempt.session.changes
        yield Kill(
            strike=attempt.strike,
            ended_by=attempt.session.ended_by,
            at=changes[-1][1] if changes else "start-up",
            lost_seconds=max(0.0, attempt.session.struck - attempt.kept_until),
            resumed_from=following.session.resumed_from,
        )


def _keep_or_remove(folder: Path, attempts: list[Attempt], *, keep: bool) -> None:
    if not keep:
        shutil.rmtree(folder)
        return
    text = "\n".join(attempt.session.output for attempt in attempts)
    (folder / "output.txt").write_text(text, encoding="utf-8")


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
