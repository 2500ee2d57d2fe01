"""The whole crash test: on made-up stages that are sound or flawed, and on two real ones."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.crash import session
from benchmarks.crash.__main__ import live, outcomes, told
from benchmarks.crash.chain import Chain, needed
from benchmarks.crash.moments import METRICS, PATTERNS, Strike, Trial
from benchmarks.crash.table import lines
from benchmarks.crash.trial import conduct

ROOT = Path(__file__).parents[2]
MAKEFILE = """
RUN = run
data: $(RUN)/data/manifest.json
tokenizer: $(RUN)/tokenizer/manifest.json
pretrain: $(RUN)/pretrain/manifest.json
$(RUN)/%/manifest.json: always
	@test -e $@ || $(PYTHON) -m stages.$* --run=$(RUN)
always:
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a Makefile and three made-up stages."""
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / "stages").mkdir()
    for stage in needed(["pretrain"]):
        shutil.copy(Path(__file__).with_name("fake_stage.py"), tmp_path / "stages" / f"{stage}.py")
    return tmp_path


def command(*words: str) -> list[str]:
    """What `make crash-test` runs, for a checkout in the current folder."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
    program += "runpy.run_module('benchmarks.crash', run_name='__main__', alter_sys=True)"
    arguments = ["--stages", "pretrain", "--work", "work", "--results", "crash.json", *words]
    return [sys.executable, "-c", program, *arguments]


def crash_test(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    return subprocess.run(command(*words), cwd=checkout, capture_output=True, text=True)


def test_a_sound_stage_survives_every_moment_and_signal(checkout):
    result = crash_test(checkout, "--kills", "20")
    assert result.returncode == 0, result.stderr
    found = json.loads((checkout / "crash.json").read_text())
    kills = [kill for trial in found["trials"] for kill in trial["kills"]]
    assert len(kills) == found["kills"] >= 20
    assert {kill["signal"] for kill in kills} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert set(PATTERNS) < {kill["moment"] for kill in kills}
    assert any(kill["resumed_from"] == 3 for kill in kills)
    assert max(len(trial["kills"]) for trial in found["trials"]) > 1
    assert "| pretrain | " in result.stdout
    assert not list((checkout / "work").glob("trial-*"))


def test_a_strike_that_comes_too_late_is_told_and_is_no_kill(checkout):
    straight = Chain(checkout, checkout / "work" / "straight" / "chain")
    straight.run.mkdir(parents=True)
    live(straight, ["pretrain"])
    late = Strike("a step", METRICS, count=99)
    outcome = conduct(Trial(1, "pretrain", (late, late)), straight, checkout / "work" / "trial-1")
    assert (outcome.kills, outcome.differences, outcome.missed) == ((), (), "a step")
    assert told(outcome).startswith("pretrain: a step: too late: equal, ")


def in_a_run(checkout: Path, *strikes: Strike) -> tuple[str, ...]:
    """What one trial of the made-up pretrain stage finds."""
    straight = Chain(checkout, checkout / "work" / "straight" / "chain")
    straight.run.mkdir(parents=True)
    live(straight, ["pretrain"])
    trial = Trial(1, "pretrain", strikes)
    return conduct(trial, straight, checkout / "work" / "trial-1").differences


STEP_8 = Strike("a step", METRICS, count=8)
LAST_ROTATION = Strike("a point's rotation", "rmdir checkpoints/step-6")


@pytest.mark.parametrize(
    ("flaw", "strike", "named"),
    [
        ("doubles rows", STEP_8, "metrics.jsonl: row 8 is row 7 again"),
        ("forgets its generator", STEP_8, "metrics.jsonl: row 7, weight: "),
        ("forgets its generator", STEP_8, "model.json: weight: "),
        ("forgets its generator", STEP_8, "checkpoints/step-12/state.json: generator/1/624: "),
        ("leaves things behind", LAST_ROTATION, "checkpoints/step-6 was left over"),
        ("ignores points", STEP_8, "went on from None though there was step-6"),
    ],
)
def test_a_flawed_stage_is_found_out_and_its_folder_kept(checkout, flaw, strike, named):
    (checkout / "flaw").write_text(flaw)
    found = in_a_run(checkout, strike)
    assert any(line.startswith(named) for line in found), found
    folder = checkout / "work" / "trial-1"
    assert (folder / "output.txt").exists()
    assert (folder / "chain" / "pretrain" / "manifest.json").exists()


@pytest.mark.parametrize("strike", [STEP_8, LAST_ROTATION])
def test_the_same_strikes_find_nothing_in_a_sound_stage(checkout, strike):
    assert in_a_run(checkout, strike) == ()
    assert not (checkout / "work" / "trial-1").exists()


def test_one_trial_of_a_seed_runs_alone(checkout):
    result = crash_test(checkout, "--trial", "4")
    assert result.returncode == 0, result.stderr
    assert "trial-4" not in result.stderr
    assert "| pretrain | 1 |" in result.stdout
    assert not (checkout / "crash.json").exists()


def test_a_stage_that_fails_undisturbed_ends_the_test(checkout):
    (checkout / "stages" / "tokenizer.py").write_text("raise SystemExit('no vocabulary')")
    result = crash_test(checkout)
    assert result.returncode == 1
    assert "crash-test: tokenizer failed undisturbed" in result.stderr
    assert "no vocabulary" in result.stderr


def test_a_stage_that_never_finishes_is_told(checkout):
    (checkout / "flaw").write_text("cannot go on")
    found = in_a_run(checkout, STEP_8)
    assert len(found) == 1
    assert found[0].startswith("not finished: make: *** [")


def test_no_kills_are_refused(checkout):
    result = crash_test(checkout, "--kills", "0")
    assert "--kills must be at least 1" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_test_leaves_no_stage_running(checkout, number):
    beats = checkout / "beats"
    stage = "import time\nfor _ in range(3000):\n"
    stage += f"    open({str(beats)!r}, 'a').write('.')\n    time.sleep(0.01)\n"
    (checkout / "stages" / "data.py").write_text(stage)
    process = subprocess.Popen(command(), cwd=checkout, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not beats.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    size = beats.stat().st_size
    time.sleep(0.2)
    assert beats.stat().st_size == size


def test_a_session_that_hangs_is_ended(checkout, monkeypatch):
    (checkout / "stages" / "data.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(session, "TIMEOUT_SECONDS", 0.3)
    chain = Chain(checkout, checkout / "work" / "chain")
    chain.run.mkdir(parents=True)
    assert session.run(chain, "data").ended_by == "hung"


def test_two_real_stages_survive_kills_at_a_save_and_while_they_end(tmp_path):
    straight = Chain(ROOT, tmp_path / "straight" / "chain")
    straight.run.mkdir(parents=True)
    live(straight, ["data", "tokenizer", "pretrain"])
    save = Strike("a save", PATTERNS["a save"], count=20)
    rotation = Strike("a point's rotation", PATTERNS["a point's rotation"], count=4)
    end = Strike("the manifest's rename", PATTERNS["the manifest's rename"])
    plan = iter([Trial(1, "tokenizer", (end,)), Trial(2, "pretrain", (save, rotation))])
    found = list(outcomes(plan, straight, kills=3))
    assert [outcome.differences for outcome in found] == [(), ()]
    killed = [kill for outcome in found for kill in outcome.kills]
    assert [kill.ended_by for kill in killed] == ["SIGKILL"] * 3
    assert re.search(r"\.step-\d+\.tmp", killed[1].at)
    assert re.search(r"checkpoints/\.step-\d+\.old", killed[2].at)
    assert killed[2].resumed_from is not None
    assert "| all | 2 | 3 | 3 |" in "\n".join(lines(found))
