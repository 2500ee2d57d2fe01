"""The tables count by hand-made outcomes."""

from benchmarks.crash.moments import Strike, Trial
from benchmarks.crash.table import lines, record
from benchmarks.crash.trial import Kill, Outcome


def kill(moment: str, *, lost: float, resumed: int | None, **strike: object) -> Kill:
    return Kill(Strike(moment, **strike), "75", "open metrics.jsonl", lost, resumed)


TWICE = (kill("a save", lost=1.0, resumed=3), kill("a step", lost=4.0, resumed=None))
ONCE = (kill("a step", lost=2.0, resumed=6, signal="SIGINT", times=2),)
ALONE = (kill("a save", lost=0.5, resumed=None, signal="SIGTERM", alone=True),)
OUTCOMES = [
    Outcome(Trial(1, "sft", (TWICE[0].strike, TWICE[1].strike)), TWICE, (), 10.0),
    Outcome(Trial(2, "sft", (ONCE[0].strike,)), ONCE, ("model.json: byte 1",), 10.0),
    Outcome(Trial(3, "data", (ALONE[0].strike,)), ALONE, (), 1.0),
]


def test_kills_are_counted_by_stage_and_by_moment():
    found = lines(OUTCOMES)
    assert found[2:5] == [
        "| sft | 2 | 3 | 2 | 2 | 2 | 1 | 2.0 | 4.0 | 1 |",
        "| data | 1 | 1 | 1 | 1 | 0 | 1 | 0.5 | 0.5 | 0 |",
        "| all | 3 | 4 | 3 | 2 | 2 | 2 | 1.5 | 4.0 | 1 |",
    ]
    assert found[8:10] == ["| a save | 2 | 2 |", "| a step | 2 | 1 |"]
    assert found[-1] == (
        "Signals and how make tells the end: SIGINT twice to the group, 75: 1, "
        "SIGKILL to the group, 75: 2, SIGTERM to the stage alone, 75: 1."
    )


def test_a_stage_that_no_strike_reached_has_a_row():
    missed = Outcome(Trial(1, "sft", (Strike("a step"),)), (), (), 1.0)
    assert lines([missed])[2] == "| sft | 1 | 0 | 0 | 0 | 0 | 0 |  |  | 0 |"
    assert record(missed)["missed"] == "a step"


def test_a_trial_is_recorded_with_all_that_repeats_it():
    found = record(OUTCOMES[1])
    assert (found["trial"], found["stage"], found["missed"]) == (2, "sft", "")
    assert found["differences"] == ["model.json: byte 1"]
    assert found["kills"] == [
        {
            "moment": "a step",
            "pattern": "",
            "count": 1,
            "delay": 0.0,
            "signal": "SIGINT",
            "alone": False,
            "times": 2,
            "ended_by": "75",
            "at": "open metrics.jsonl",
            "lost_seconds": 2.0,
            "resumed_from": 6,
        }
    ]
