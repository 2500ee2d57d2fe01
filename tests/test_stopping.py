"""When a stage saves and stops: the clock, the signals, the deadline."""

import os
import signal
import time

import pytest

from pipeline import stopping
from pipeline.errors import UserError
from pipeline.saving import Saving
from pipeline.stopping import Due, Stopped, keep_pace

NOTHING, SAVE, STOP = Due(save=False, stop=False), Due(save=True, stop=False), Due(True, True)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        time = monotonic

    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    return clock


def test_points_are_due_by_steps():
    with keep_pace(Saving(every=3), stage="sft") as pace:
        assert [pace.after(step).save for step in range(1, 7)] == [False, False, True] * 2
    with keep_pace(Saving(every=0), stage="sft") as pace:
        assert pace.after(100) == NOTHING


def test_points_are_due_by_minutes_since_the_last_one(clock):
    with keep_pace(Saving(every=4, minutes=1.0), stage="sft") as pace:
        found = []
        for step in range(1, 8):
            clock.now += 25.0
            found.append(pace.after(step).save)
    # By minutes after 75 s (step 3), by steps at 4, by minutes 75 s after that (step 7).
    assert found == [False, False, True, True, False, False, True]


def test_a_stage_stops_before_a_step_that_would_pass_the_deadline(clock):
    saving = Saving(every=0, deadline=1100.0, grace_seconds=20.0)
    with keep_pace(saving, stage="sft") as pace:
        clock.now += 30.0  # at 1030 another 30 and the grace of 20 end at 1080
        assert pace.after(1) == NOTHING
        clock.now += 30.0  # at 1060 they would end at 1110
        assert pace.after(2) == STOP
        assert pace.asked_by == "the deadline is near"


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl")])
def test_a_signal_ends_the_step_saves_and_stops(number, name, capfd):
    with keep_pace(Saving(every=0), stage="sft") as pace:
        assert pace.after(1) == NOTHING
        os.kill(os.getpid(), number)
        assert pace.after(2) == STOP
        assert pace.asked_by.startswith(name)
    assert "sft: " in capfd.readouterr().err


def test_a_signal_while_the_processes_agree_is_for_the_next_time(monkeypatch):
    """Else the one that it came to would stop, and wait for others that go on."""

    def interrupted(value):
        os.kill(os.getpid(), signal.SIGTERM)
        return ["", value]

    with keep_pace(Saving(every=0), stage="sft") as pace:
        with monkeypatch.context() as patch:
            patch.setattr(stopping, "gather_objects", interrupted)
            assert not pace.stops()
        assert pace.after(1) == STOP
        assert pace.asked_by == "SIGTERM"


def test_what_another_process_was_asked_stops_this_one(monkeypatch):
    monkeypatch.setattr(stopping, "gather_objects", lambda value: [value, "SIGTERM"])
    with keep_pace(Saving(every=0), stage="sft") as pace:
        assert pace.stops()
        assert pace.asked_by == "SIGTERM"


def test_a_second_interrupt_stops_at_once_but_a_second_sigterm_does_not():
    with (
        pytest.raises(KeyboardInterrupt),
        keep_pace(Saving(every=0), stage="sft") as pace,
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster sends it to the launcher and to us
        assert pace.after(1) == STOP
        os.kill(os.getpid(), signal.SIGINT)


def test_a_step_longer_than_the_grace_is_left():
    with (
        pytest.raises(Stopped, match="SIGTERM: the step was not done after 0.05 s"),
        keep_pace(Saving(every=0, grace_seconds=0.05), stage="sft"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_signals_are_as_before_afterwards():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    with keep_pace(Saving(), stage="sft"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "saving.every: must be at least 0, got -1"),
        ({"minutes": -1.0}, "saving.minutes: must be at least 0, got -1.0"),
        ({"deadline": -1.0}, "saving.deadline: must be at least 0, got -1.0"),
        ({"keep": 0}, "saving.keep: must be at least 1, got 0"),
        ({"grace_seconds": 0.0}, "saving.grace_seconds: must be positive, got 0.0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        Saving(**settings)
