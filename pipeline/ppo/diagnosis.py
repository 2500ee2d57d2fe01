"""What the metrics of a run say is going wrong: rules over the course so far. No torch.

A rule looks at whole windows of updates, never at one noisy point, and is told once per run. What
each one means and what to do about it stands in docs/diagnosis.md.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.distributed import is_main
from pipeline.ppo.guard import Look, over_optimised

log = logging.getLogger(__name__)

PREFIX = "diagnosis/"
DOCUMENT = "docs/diagnosis.md"

WINDOW = 5
"""Updates of a window: at 16 responses each, a share of them is known to about 0.05."""
WARM_UP = 10
"""Updates in which a value model may still be worse than a constant."""
NEGATIVE_NATS = 0.1
"""KL per response below which minus is no sampling noise when every update of a window has it."""
FIRST_KL = 5e-3
"""Approximate KL of a first minibatch: ratios about 10% off; bfloat16 rounds to a tenth of it."""
EOS_DROP = 0.2
"""Share of the responses that no longer end."""
LENGTH_FACTOR = 1.5
"""Longer or shorter than at the start by this factor."""
ENTROPY_LEFT = 0.4
"""Share of the entropy at the start: a policy a few nats from its reference keeps far more."""
KL_FACTOR = 2.0
"""Multiple of its target that the KL passes only when the controller has lost it."""
CLIP_FRAC = 0.4
"""Share of clipped tokens: usual are 0.02 to 0.2."""
GUARD_LOOKS = 2
"""Looks at validation in a row that must agree."""


class Windows:
    """The first and the last window of a metric, whatever number of values came between.

    Attributes:
        count: values so far.
        first: the first window.
        last: the last window.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        """Takes in one value."""
        self.count += 1
        self.last.append(value)
        if len(self.first) < WINDOW:
            self.first.append(value)


class Course:
    """The metrics logged so far, by name.

    Attributes:
        kl_target: KL per response in nats that a controller steers to; None when none does.
        windows: every metric's.
        looks: those that the guard judged.
    """

    def __init__(self, *, kl_target: float | None = None) -> None:
        self.kl_target = kl_target
        self.windows: dict[str, Windows] = defaultdict(Windows)
        self.looks: list[Look] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in one row of metrics."""
        for name, value in row.items():
            self.windows[name].add(float(value))
        if "guard/score" in row:
            self.looks.append((row["guard/score"], row["validation/score"]))

    def start(self, name: str) -> float:
        """Returns a metric's mean over the first window."""
        return fmean(self.windows[name].first)

    def now(self, name: str) -> Sequence[float]:
        """Returns a metric's last window."""
        return self.windows[name].last


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Something that can be seen going wrong."""

    name: str
    """Its metric is diagnosis/<name>, its section in the document has the same name."""
    sign: str
    """What is seen."""
    cause: str
    """What is most often behind it."""
    metric: str
    """What it watches; without that metric it never holds."""
    wait: int
    """Values of the metric before it may hold."""
    shown_by: Callable[[Course], bool]
    """Whether a course with enough values shows it."""

    @property
    def section(self) -> str:
        """Where its cure stands."""
        return f"{DOCUMENT}#{self.name}"

    def holds(self, course: Course) -> bool:
        """Returns whether the course so far shows it."""
        return course.windows[self.metric].count >= self.wait and self.shown_by(course)


def _length_drifted(course: Course) -> bool:
    ratio = fmean(course.now("response/length_tokens")) / course.start("response/length_tokens")
    return not 1 / LENGTH_FACTOR <= ratio <= LENGTH_FACTOR


def _kl_lost(course: Course) -> bool:
    target = course.kl_target
    return target is not None and min(course.now("objective/kl")) > KL_FACTOR * target


RULES = (
    Rule(
        name="kl_negative",
        sign="the KL to the reference is negative",
        cause="responses are not drawn from the distribution whose log-probabilities are taken "
        "(top-k, top-p, another temperature, a wrong mask), or a sign is turned round",
        metric="objective/kl",
        wait=WINDOW,
        shown_by=lambda course: (
            max(now := course.now("objective/kl")) < 0 and fmean(now) < -NEGATIVE_NATS
        ),
    ),
    Rule(
        name="ratio_not_one",
        sign="the ratio is not 1 in the first minibatch, before any step",
        cause="rollout and optimisation compute log-probabilities differently: dropout, precision, "
        "temperature, or positions under padding",
        metric="policy/first_approx_kl",
        wait=WINDOW,
        shown_by=lambda course: min(course.now("policy/first_approx_kl")) > FIRST_KL,
    ),
    Rule(
        name="eos_falling",
        sign="fewer responses end with EOS than at the start",
        cause="not ending costs too little: the reward model likes long texts, or EOS is left out "
        "of the loss",
        metric="response/eos_frac",
        wait=2 * WINDOW,
        shown_by=lambda course: (
            fmean(course.now("response/eos_frac")) < course.start("response/eos_frac") - EOS_DROP
        ),
    ),
    Rule(
        name="length_drifting",
        sign=f"responses are over {LENGTH_FACTOR:g} times longer or shorter than at the start",
        cause="the reward model pays for length, or for brevity, and not for what is said",
        metric="response/length_tokens",
        wait=2 * WINDOW,
        shown_by=_length_drifted,
    ),
    Rule(
        name="entropy_collapse",
        sign=f"less than {ENTROPY_LEFT:.0%} of the entropy at the start is left",
        cause="the policy has found one answer that scores for every prompt: too high a learning "
        "rate, or too small a KL coefficient",
        metric="objective/entropy",
        wait=2 * WINDOW,
        shown_by=lambda course: (
            fmean(course.now("objective/entropy"))
            < ENTROPY_LEFT * course.start("objective/entropy")
        ),
    ),
    Rule(
        name="value_useless",
        sign="the value model explains less of the returns than a constant would",
        cause="the value model learns too slowly for the returns it must predict, or its values "
        "are scaled differently from the scores",
        metric="value/explained_variance",
        wait=WARM_UP + WINDOW,
        shown_by=lambda course: max(course.now("value/explained_variance")) < 0,
    ),
    Rule(
        name="guard_falling",
        sign="the score rises while the guard's falls",
        cause="the policy exploits the reward model's mistakes: over-optimisation",
        metric="guard/score",
        wait=GUARD_LOOKS + 1,
        shown_by=lambda course: over_optimised(course.looks, patience=GUARD_LOOKS),
    ),
    Rule(
        name="kl_over_target",
        sign=f"the KL to the reference is over {KL_FACTOR:g} times its target",
        cause="the KL coefficient is too small, or grows too slowly, for this learning rate",
        metric="objective/kl",
        wait=WINDOW,
        shown_by=_kl_lost,
    ),
    Rule(
        name="clip_frac_high",
        sign=f"over {CLIP_FRAC:.0%} of the tokens are clipped",
        cause="the steps of an update go further than its rollout can be trusted: too high a "
        "learning rate, or too many epochs",
        metric="policy/clip_frac",
        wait=WINDOW,
        shown_by=lambda course: min(course.now("policy/clip_frac")) > CLIP_FRAC,
    ),
)


class Diagnoser:
    """Reads the rows of metrics as they come and tells each thing it sees once."""

    def __init__(self, *, kl_target: float | None = None) -> None:
        self.course = Course(kl_target=kl_target)
        self.told: set[str] = set()

    def read(self, row: Mapping[str, float], *, update: int) -> dict[str, float]:
        """Returns the row with `diagnosis/<name>`: 1.0 for each rule that now holds first."""
        self.course.add(row)
        found = [rule for rule in RULES if rule.name not in self.told and rule.holds(self.course)]
        self.told |= {rule.name for rule in found}
        for rule in found if is_main() else ():
            log.warning(
                "update %d: %s. Likely: %s (%s)", update, rule.sign, rule.cause, rule.section
            )
        return {**row, **{f"{PREFIX}{rule.name}": 1.0 for rule in found}}

    def recall(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes up what an interrupted run has logged, without telling it again."""
        for row in rows:
            self.course.add(row)
            self.told |= {name.removeprefix(PREFIX) for name in row if name.startswith(PREFIX)}
