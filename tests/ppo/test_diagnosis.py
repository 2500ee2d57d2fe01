"""The diagnoser: for each rule a course that shows it and one that does not, and a real fault."""

import random
import re
from pathlib import Path

import pytest

from pipeline.ppo import experience
from pipeline.ppo.diagnosis import DOCUMENT, PREFIX, RULES, Diagnoser
from tests.ppo.worlds import trainer

UPDATES = 30
TARGET = 6.0
HEALTHY = {
    "objective/kl": lambda t: 6.0 * t,
    "policy/first_approx_kl": lambda t: 1e-8,
    "response/eos_frac": lambda t: 0.9 + 0.08 * t,
    "response/length_tokens": lambda t: 12.0 + 2.0 * t,
    "objective/entropy": lambda t: 4.0 - 1.2 * t,
    "value/explained_variance": lambda t: -1.0 + 4.0 * t if t < 0.3 else 0.4,
    "policy/clip_frac": lambda t: 0.1,
    "guard/score": lambda t: t,
    "validation/score": lambda t: 2.0 * t,
}
SICK = {
    "kl_negative": {"objective/kl": lambda t: -0.4 * t},
    "ratio_not_one": {"policy/first_approx_kl": lambda t: 0.02},
    "eos_falling": {"response/eos_frac": lambda t: 0.9 - 0.5 * t},
    "length_drifting": {"response/length_tokens": lambda t: 12.0 + 14.0 * t},
    "entropy_collapse": {"objective/entropy": lambda t: 4.0 * (1 - t) ** 2},
    "value_useless": {"value/explained_variance": lambda t: -0.3},
    "guard_falling": {"guard/score": lambda t: t if t < 0.5 else 1.0 - t},
    "kl_over_target": {"objective/kl": lambda t: 20.0 * t},
    "clip_frac_high": {"policy/clip_frac": lambda t: 0.6},
}


def course(**changes):
    """Rows of a run with a little noise; the time runs from 0 to 1."""
    generator = random.Random(0)
    shapes = HEALTHY | changes
    return [
        {name: shape(t / UPDATES) + generator.gauss(0, 0.003) for name, shape in shapes.items()}
        for t in range(UPDATES)
    ]


def told(rows, diagnoser=None):
    """Names of the rules in the order they were told, with their updates."""
    diagnoser = diagnoser or Diagnoser(kl_target=TARGET)
    found = []
    for update, row in enumerate(rows, start=1):
        read = diagnoser.read(row, update=update)
        assert read.items() >= row.items()
        assert all(read[name] == 1.0 for name in read.keys() - row.keys())
        found += [(update, name.removeprefix(PREFIX)) for name in read.keys() - row.keys()]
    return found


def test_a_healthy_course_is_told_nothing():
    assert told(course()) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_sick_course_is_told_once_with_its_cause(rule, caplog):
    found = told(course(**SICK[rule.name]))
    assert [name for _, name in found] == [rule.name]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"update {found[0][0]}: {rule.sign}. Likely: {rule.cause} ({rule.section})"]
    assert found[0][0] >= rule.wait


@pytest.mark.parametrize(
    "changes",
    [
        {"objective/kl": lambda t: -3.0 if 0.4 < t < 0.5 else 0.05},
        {"objective/kl": lambda t: -0.02},
        {"policy/first_approx_kl": lambda t: 1.0 if t == 0.5 else 0.0},
        {"response/eos_frac": lambda t: 0.1 if t == 0.5 else 0.9},
        {"value/explained_variance": lambda t: -2.0 if t < 0.3 or t == 0.6 else 0.2},
        {"policy/clip_frac": lambda t: 0.6 if 0.4 < t < 0.5 else 0.1},
        {"guard/score": lambda t: -t, "validation/score": lambda t: -t},
        {"guard/score": lambda t: 0.0 if t == 0.5 else t},
    ],
)
def test_noise_and_single_points_are_told_nothing(changes):
    assert told(course(**changes)) == []


def test_shorter_responses_drift_as_much_as_longer_ones():
    found = told(course(**{"response/length_tokens": lambda t: 12.0 - 8.0 * t}))
    assert [name for _, name in found] == ["length_drifting"]


def test_without_a_target_a_guard_or_a_value_model_their_rules_are_silent():
    missing = ("guard/score", "value/explained_variance")
    rows = course(**SICK["kl_over_target"])
    rows = [{name: row[name] for name in row if name not in missing} for row in rows]
    assert told(rows, Diagnoser(kl_target=None)) == []


@pytest.mark.parametrize("name", sorted(SICK))
@pytest.mark.parametrize("done", [1, 17, 29])
def test_a_resumed_diagnoser_tells_what_a_straight_one_tells(name, done):
    rows = course(**SICK[name])
    straight, first, second = (Diagnoser(kl_target=TARGET) for _ in range(3))
    expected = [straight.read(row, update=number) for number, row in enumerate(rows)]
    logged = [first.read(row, update=number) for number, row in enumerate(rows[:done])]
    second.recall([{"step": number, **row} for number, row in enumerate(logged)])
    rest = [second.read(row, update=number) for number, row in enumerate(rows[done:])]
    assert logged + rest == expected


def test_every_rule_has_its_section():
    headings = re.findall(r"^## (\w+)$", Path(DOCUMENT).read_text(), re.MULTILINE)
    assert headings == [rule.name for rule in RULES]


def test_a_kl_taken_the_wrong_way_round_is_found_in_a_real_run(monkeypatch):
    k1 = experience.k1
    monkeypatch.setattr(experience, "k1", lambda logprobs, ref: k1(ref, logprobs))
    ppo = trainer(updates=7)
    found = told(ppo.update(number).metrics for number in range(7))
    assert "kl_negative" in [name for _, name in found]


def test_the_same_run_without_the_fault_is_told_no_such_thing():
    ppo = trainer(updates=7)
    names = [name for _, name in told(ppo.update(number).metrics for number in range(7))]
    assert not {"kl_negative", "ratio_not_one"} & set(names)
