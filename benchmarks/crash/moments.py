"""When a stage is struck: named moments, found in a straight run's trace, drawn from a seed."""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

T = TypeVar("T")

FIRST_CHANGES = 3
"""Changes that belong to the preparation of a folder."""
EARLIEST_SECONDS = 0.001
"""Shortest delay: none at all is an instant before a change, not after it."""
END_SECONDS = 0.005
"""From the manifest's rename to the end of Python."""
MANIFEST = r"rename \.manifest\.json\.tmp"
METRICS = r"open metrics\.jsonl"
PATTERNS = {
    "any change": ".",
    "a save": r"\.step-\d+\.tmp",
    "a point's rename": r"rename checkpoints/\.step-\d+\.tmp ->",
    "a point's rotation": r"^\w+ checkpoints/(step-|\.step-\d+\.old)",
    "before the manifest": r"open \.manifest\.json\.tmp",
    "the manifest's rename": MANIFEST,
}
"""Moments before a change of the folder: in front of one that matches, drawn among all."""
ORDERS = (1, 1, 1, 2, 2, 3)
"""Strikes of a trial in a row, as often as they stand here."""
SIGNALS = (
    *[("SIGKILL", False, 1)] * 8, ("SIGKILL", True, 1),
    ("SIGTERM", False, 1), ("SIGTERM", True, 1),
    ("SIGINT", False, 1), ("SIGINT", True, 1), ("SIGINT", False, 2),
)  # fmt: skip
"""Signals, whether the stage's process gets it alone instead of make's group, and how often."""
ROUNDS = {"data": 1, "tokenizer": 1, "evaluate": 1, "report": 1}
"""Trials of a stage in one round of all stages; others, which have resume points, get four."""


@dataclass(frozen=True)
class Strike:
    """A signal at an instant.

    Attributes:
        moment: what the instant is called.
        pattern: regular expression of the change before which it falls; empty: by the clock.
        count: which of the matching changes of the session.
        delay: seconds after that change, or after the session's start.
        signal: name of the signal.
        alone: the stage's process gets it alone; else all of the process group, make included.
        times: how often it is sent.
    """

    moment: str
    pattern: str = ""
    count: int = 1
    delay: float = 0.0
    signal: str = "SIGKILL"
    alone: bool = False
    times: int = 1


@dataclass(frozen=True)
class Trial:
    """What one trial does to a stage: strikes in a row, a session each, before the last session."""

    number: int
    stage: str
    strikes: tuple[Strike, ...]


@dataclass(frozen=True)
class Life:
    """A stage's straight run: what it changed and when.

    Attributes:
        seconds: from its start to its end.
        changes: seconds since the start, and what changed.
        boundary: steps of one pass over the training rows, or None.
        rollout_seconds: of one rollout, or None where there are none.
        rows: steps of the rows of metrics.jsonl.
    """

    seconds: float
    changes: tuple[tuple[float, str], ...]
    boundary: int | None = None
    rollout_seconds: float | None = None
    rows: tuple[int, ...] = ()

    def count(self, pattern: str) -> int:
        """Returns how many changes match."""
        return sum(re.search(pattern, change) is not None for _, change in self.changes)

    @property
    def working_from(self) -> float:
        """Seconds from the start to the first row of metrics, or to the end where there is none."""
        times = (seconds for seconds, change in self.changes if re.search(METRICS, change))
        return next(times, self.seconds)

    @property
    def step_seconds(self) -> float:
        """Seconds between two rows of metrics, the median."""
        times = [seconds for seconds, change in self.changes if re.search(METRICS, change)]
        return median(after - before for before, after in itertools.pairwise(times))


def moments(life: Life) -> list[str]:
    """Returns the names of the moments that a stage has."""
    found = ["start-up", "the clock", "preparing", "just finished"]
    found += [name for name, pattern in PATTERNS.items() if life.count(pattern)]
    if len(life.rows) > 2:
        found += ["a step", "the last step"]
    if life.boundary is not None and life.boundary < life.rows[-1]:
        found.append("a pass's end")
    if life.rollout_seconds is not None:
        found.append("a rollout")
    return found


def strike(moment: str, life: Life, *, again: bool, generator: random.Random) -> Strike:
    """Returns an instant of a moment, by chance.

    Args:
        moment: one of `moments`.
        life: the stage's straight run.
        again: whether the stage was struck before; it then has less of its life left, and the
            first change of the kind is taken.
        generator: source of chance.
    """
    if moment == "start-up":
        return Strike(moment, delay=generator.uniform(EARLIEST_SECONDS, life.changes[0][0]))
    if moment == "the clock":
        end = life.working_from if again else life.seconds
        return _by_the_clock(generator.uniform(EARLIEST_SECONDS, end), life)
    if moment == "preparing":
        return Strike(moment, ".", count=generator.randint(1, FIRST_CHANGES))
    if moment == "just finished":
        return Strike(moment, MANIFEST, delay=generator.uniform(0.0001, END_SECONDS))
    if moment in PATTERNS:
        pattern = PATTERNS[moment]
        count = 1 if again else generator.randint(1, life.count(pattern))
        return Strike(moment, pattern, count=count)
    return _in_training(moment, life, again=again, generator=generator)


def _by_the_clock(seconds: float, life: Life) -> Strike:
    """An instant of the straight run, told from the change before it: machines are not always fast.

    Before the first change it is told from the start.
    """
    before = [moment for moment, _ in life.changes if moment <= seconds]
    if not before:
        return Strike("the clock", delay=seconds)
    delay = seconds - before[-1]
    return Strike("the clock", ".", count=len(before), delay=max(delay, EARLIEST_SECONDS))


def _in_training(moment: str, life: Life, *, again: bool, generator: random.Random) -> Strike:
    """An instant after a row of metrics: within a step, or the rollout that begins one."""
    rows = len(life.rows)
    within = life.rollout_seconds if moment == "a rollout" else life.step_seconds
    count = 1 if again else generator.randint(1, rows - 1)
    if moment == "the last step" and not again:
        last = life.rows[-1]
        count = max(1, sum(step < last for step in life.rows))
    if moment == "a pass's end" and not again:
        assert life.boundary is not None
        count = max(1, sum(step <= life.boundary for step in life.rows))
    return Strike(moment, METRICS, count=count, delay=generator.uniform(0.001, within or 0.1))


def trials(lives: Mapping[str, Life], stages: Sequence[str], *, seed: int) -> Iterator[Trial]:
    """Yields trials without end: each stage goes through all its moments, in an order by chance.

    A trial is a function of the seed, its number and the straight runs, never of other trials.
    """
    plans = {stage: _strikes(lives[stage], random.Random(f"{seed}/{stage}")) for stage in stages}
    most = max(ROUNDS.get(stage, 4) for stage in stages)
    turns = [stage for turn in range(most) for stage in stages if turn < ROUNDS.get(stage, 4)]
    for number, stage in enumerate(itertools.cycle(turns), start=1):
        yield Trial(number, stage, next(plans[stage]))


def _strikes(life: Life, generator: random.Random) -> Iterator[tuple[Strike, ...]]:
    """Yields the strikes of one trial after another."""
    firsts = _dealt(moments(life), generator)
    laters = _dealt(moments(life), generator)
    signals = _dealt(SIGNALS, generator)
    for number in _dealt(ORDERS, generator):
        row = []
        for order in range(number):
            moment = next(laters if order else firsts)
            instant = strike(moment, life, again=order > 0, generator=generator)
            name, alone, times = next(signals)
            if not instant.pattern:
                alone, times = False, 1  # from outside, where the group is known
            row.append(replace(instant, signal=name, alone=alone, times=times))
        yield tuple(row)


def _dealt(cards: Sequence[T], generator: random.Random) -> Iterator[T]:
    """Yields all cards in an order by chance, then all of them in another, without end."""
    while True:
        yield from generator.sample(cards, len(cards))
