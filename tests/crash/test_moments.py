"""Strikes are drawn from the seed, reach every moment, and fall where the name says."""

import itertools
import random
import re

import pytest

from benchmarks.crash.moments import PATTERNS, Life, moments, strike, trials

CHANGES = ["mkdir ."]
for step in range(1, 7):
    CHANGES += ["open metrics.jsonl"]
    if step % 2 == 0:
        temporary = f"checkpoints/.step-{step}.tmp"
        CHANGES += [f"mkdir {temporary}", f"open {temporary}/.point.json.tmp"]
        CHANGES += [f"rename {temporary} -> checkpoints/step-{step}"]
    if step == 6:
        CHANGES += ["rename checkpoints/step-2 -> checkpoints/.step-2.old"]
        CHANGES += ["rmtree checkpoints/.step-2.old"]
CHANGES += ["open .manifest.json.tmp", "rename .manifest.json.tmp -> manifest.json"]
TRAINED = Life(
    seconds=10.0,
    changes=tuple((3.0 + number / 4, change) for number, change in enumerate(CHANGES)),
    boundary=4,
    rows=(1, 2, 3, 4, 5, 6),
)
SIMPLE = Life(seconds=2.0, changes=((1.0, "mkdir ."), (1.5, "rename .manifest.json.tmp -> m")))
LIVES = {"data": SIMPLE, "pretrain": TRAINED}


def matching(moment: str, seed: int = 1, *, again: bool = False) -> str:
    """The change before which a strike falls."""
    planned = strike(moment, TRAINED, again=again, generator=random.Random(seed))
    found = [change for change in CHANGES if re.search(planned.pattern, change)]
    return found[planned.count - 1]


def test_a_stage_has_the_moments_that_its_life_shows():
    assert set(moments(TRAINED)) == {
        *("start-up", "the clock", "preparing", "just finished", "a step", "the last step"),
        *("a pass's end", *PATTERNS),
    }
    assert set(moments(SIMPLE)) == {
        *("start-up", "the clock", "preparing", "just finished", "any change"),
        "the manifest's rename",
    }


def test_a_rollout_is_a_moment_where_there_are_rollouts():
    life = Life(seconds=10.0, changes=TRAINED.changes, rollout_seconds=0.05, rows=TRAINED.rows)
    assert "a rollout" in moments(life)
    assert 0 < strike("a rollout", life, again=False, generator=random.Random(1)).delay <= 0.05


@pytest.mark.parametrize("seed", range(20))
def test_strikes_fall_where_their_names_say(seed):
    assert ".step-" in matching("a save", seed)
    assert re.match(r"rename checkpoints/\.step-\d\.tmp ->", matching("a point's rename", seed))
    assert matching("a point's rotation", seed) in CHANGES[-4:-2]
    assert matching("the manifest's rename", seed) == CHANGES[-1]
    assert matching("just finished", seed) == CHANGES[-1]
    assert matching("preparing", seed) in CHANGES[:3]
    assert not strike("start-up", TRAINED, again=True, generator=random.Random(seed)).pattern
    assert strike("start-up", TRAINED, again=False, generator=random.Random(seed)).delay < 3.0


def test_a_pass_ends_after_its_last_row_and_the_last_step_after_the_row_before():
    after = strike("a pass's end", TRAINED, again=False, generator=random.Random(1))
    assert (after.pattern, after.count) == (r"open metrics\.jsonl", 4)
    last = strike("the last step", TRAINED, again=False, generator=random.Random(1))
    assert last.count == 5
    assert 0 < last.delay <= TRAINED.step_seconds


@pytest.mark.parametrize("seed", range(20))
def test_the_clock_is_told_from_the_change_before(seed):
    seconds = random.Random(seed).uniform(0.001, TRAINED.seconds)
    struck = strike("the clock", TRAINED, again=False, generator=random.Random(seed))
    if not struck.pattern:
        assert seconds < 3.0
        assert struck.delay == seconds
        return
    since = TRAINED.changes[struck.count - 1][0]
    assert struck.delay == pytest.approx(seconds - since)
    assert struck.count == len(CHANGES) or struck.delay < 0.25
    again = strike("the clock", TRAINED, again=True, generator=random.Random(seed))
    assert again.count <= 2


def test_the_clock_of_a_stage_without_metrics_strikes_all_its_life():
    delays = [
        strike("the clock", SIMPLE, again=True, generator=random.Random(seed)) for seed in range(30)
    ]
    assert {each.count for each in delays if each.pattern} == {1, 2}
    assert [each for each in delays if not each.pattern]


def test_a_later_strike_takes_the_first_change_of_its_kind():
    assert matching("a save", 5, again=True) == "mkdir checkpoints/.step-2.tmp"
    assert strike("the last step", TRAINED, again=True, generator=random.Random(1)).count == 1


def taken(seed: int, number: int) -> list:
    return list(itertools.islice(trials(LIVES, list(LIVES), seed=seed), number))


def test_trials_are_a_function_of_the_seed():
    assert taken(1, 40) == taken(1, 40)
    assert taken(1, 40) != taken(2, 40)


def test_trials_of_a_stage_do_not_depend_on_other_stages():
    alone = itertools.islice(trials(LIVES, ["pretrain"], seed=1), 8)
    among = [trial for trial in taken(1, 10) if trial.stage == "pretrain"]
    assert [trial.strikes for trial in alone] == [trial.strikes for trial in among]


def test_stages_with_resume_points_are_struck_four_times_as_often():
    stages = [trial.stage for trial in taken(1, 50)]
    assert stages.count("pretrain") == 40


def test_every_moment_comes_first_before_one_comes_again():
    first = [trial.strikes[0].moment for trial in taken(3, 100) if trial.stage == "pretrain"]
    number = len(moments(TRAINED))
    assert set(first[:number]) == set(moments(TRAINED))


def test_some_trials_strike_twice_and_three_times():
    numbers = [len(trial.strikes) for trial in taken(1, 30)]
    assert {1, 2, 3} == set(numbers)


def test_the_clock_strikes_the_whole_group():
    strikes = [each for trial in taken(1, 200) for each in trial.strikes]
    assert not [each for each in strikes if not each.pattern and (each.alone or each.times > 1)]
    assert {(each.signal, each.alone, each.times) for each in strikes if each.pattern} == {
        *(("SIGKILL", False, 1), ("SIGKILL", True, 1), ("SIGTERM", False, 1)),
        *(("SIGTERM", True, 1), ("SIGINT", False, 1), ("SIGINT", True, 1), ("SIGINT", False, 2)),
    }
