"""The state of every stage, from what lies on the disk at this moment."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import begin
from pipeline.config import StageConfig
from pipeline.dashboard.runs import SHOWN, Runs
from pipeline.lock import Lock, holder_of
from pipeline.manifest import CHAIN
from tests.dashboard.runs import finished, held, trained


def stages(root, name="a"):
    """The stages of a run by name."""
    runs = Runs(root)
    return {stage.name: stage for stage in runs.stages(runs.found()[name])}


def test_the_chain_is_that_of_the_makefile():
    makefile = Path("Makefile").read_text()
    chain = re.search(r"^STAGES := (.*)$", makefile, re.MULTILINE)
    optional = re.search(r"^OPTIONAL := (.*)$", makefile, re.MULTILINE)
    assert tuple(chain[1].split()) == CHAIN
    assert {*CHAIN, *optional[1].split(), "seeds"} == set(SHOWN)


def test_a_run_is_a_folder_with_a_stage_or_its_lock(tmp_path):
    finished(tmp_path / "a" / "data")
    held(tmp_path / "sweep" / "b" / "data", since=0)
    (tmp_path / "other" / "wandb").mkdir(parents=True)
    (tmp_path / "deep" / "deep" / "deep" / "deep" / "data").mkdir(parents=True)
    (tmp_path / ".hidden" / "data").mkdir(parents=True)
    assert list(Runs(tmp_path).found()) == ["a", "sweep/b"]
    assert Runs(tmp_path / "nowhere").found() == {}


def test_every_state(tmp_path):
    began = time.time() - 100
    finished(tmp_path / "a" / "data", summary={"rows": 1})
    trained(tmp_path / "a" / "pretrain", steps=9, of=20)
    (tmp_path / "a" / "pretrain" / "checkpoints" / "step-8").mkdir(parents=True)
    (tmp_path / "a" / "pretrain" / "checkpoints" / "step-10.tmp").mkdir()
    (tmp_path / "a" / "sft").mkdir()
    (tmp_path / "a" / "reward").mkdir()
    (tmp_path / "a" / "reward" / "manifest.json").write_text("{")
    trained(tmp_path / "a" / "ppo", steps=6, of=36, begin=time.time())
    held(tmp_path / "a" / "ppo", since=time.time())
    found = stages(tmp_path)
    assert list(found) == list(CHAIN)
    assert [one.state for one in found.values()] == [
        "finished", "missing", "stopped", "stopped", "damaged", "running", "missing", "missing",
    ]  # fmt: skip
    assert found["data"].manifest["circumstances"]["summary"] == {"rows": 1}
    stopped, running = found["pretrain"], found["ppo"]
    assert (stopped.step, stopped.of, stopped.point) == (9, 20, 8)
    assert found["sft"].point is None
    assert "is not valid JSON" in found["reward"].remarks[0]
    assert (running.step, running.of, running.seconds_per_step) == (6, 36, pytest.approx(2))
    assert running.seconds_left == pytest.approx(60)
    assert running.since > began


def test_a_stage_at_work_tells_how_far_it_is(tmp_path):
    """What the stages write, read back while one is at work and after it was interrupted."""
    config = StageConfig(run=str(tmp_path / "a"), tracking="none")
    with pytest.raises(KeyboardInterrupt), begin(config, stage="ppo", kind="x", parents={}) as run:
        assert stages(tmp_path)["ppo"].state == "running"
        run.total_steps = 9
        for step in (1, 2):
            run.log(step, {"a/b": 1.0})
            run.log_timings(step, {"time/seconds": 1.0})
            time.sleep(0.01)
        found = stages(tmp_path)["ppo"]
        assert (found.state, found.step, found.of) == ("running", 2, 9)
        assert 0.005 < found.seconds_per_step < 5
        run.save_point(2, lambda folder: (folder / "a").write_text("a"))
        raise KeyboardInterrupt
    found = stages(tmp_path)["ppo"]
    assert (found.state, found.step, found.of, found.point) == ("stopped", 2, 9, 2)
    row = json.loads((tmp_path / "a" / "ppo" / "timings.jsonl").read_text().splitlines()[0])
    assert 0 < row["system/memory_gib"] < 64
    assert row["system/busy_cores"] >= 0
    assert abs(row["at"] - time.time()) < 60


def test_optional_stages_stand_where_they_belong(tmp_path):
    finished(tmp_path / "a" / "reward_guard")
    finished(tmp_path / "a-seeds" / "seeds")
    assert list(stages(tmp_path))[4:7] == ["reward", "reward_guard", "ppo"]
    assert list(stages(tmp_path, "a-seeds")) == ["seeds"]


def test_the_pace_is_that_of_this_session(tmp_path):
    trained(tmp_path / "a" / "ppo", steps=6, of=36, begin=1000.0)
    held(tmp_path / "a" / "ppo", since=time.time())
    found = stages(tmp_path)["ppo"]
    assert (found.state, found.step, found.seconds_per_step) == ("running", 6, 0)


def test_a_process_that_is_gone_works_no_more(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    trained(tmp_path / "a" / "ppo", steps=2, of=4)
    held(tmp_path / "a" / "ppo", pid=gone.pid, since=time.time())
    found = stages(tmp_path)["ppo"]
    assert found.state == "stopped"
    assert found.remarks == (f"process {gone.pid}, which worked on it, is gone",)
    held(tmp_path / "a" / "ppo", since=1.0)  # our number, inherited long after the lock was taken
    assert stages(tmp_path)["ppo"].state == "stopped"


def test_another_machines_process_is_judged_by_what_it_writes(tmp_path):
    trained(tmp_path / "a" / "ppo", steps=2, of=4)
    held(tmp_path / "a" / "ppo", host="far", since=1.0)
    whose = f"process {os.getpid()} of far, which cannot be seen from here"
    found = stages(tmp_path)["ppo"]
    assert (found.state, found.remarks) == ("running", (whose,))
    for file in (tmp_path / "a" / "ppo").iterdir():
        os.utime(file, (1000, time.time() - 1200))
    found = stages(tmp_path)["ppo"]
    assert found.state == "stopped"
    assert found.remarks == (f"{whose}, has written nothing for 20 min",)


def test_a_lock_names_its_holder_while_it_is_held(tmp_path):
    path = tmp_path / ".ppo.lock"
    assert holder_of(path) is None
    lock = Lock(path)
    lock.acquire()
    holder = holder_of(path)
    assert holder.is_here
    assert holder.is_alive()
    lock.release()
    assert holder_of(path) is None
    for text in ("", "[]", '{"pid": -1, "host": "x", "since": 1}', '{"pid": 1e99}', "[" * 10**5):
        path.write_text(text)
        assert holder_of(path) is None
    path.write_text('{"pid": 99999999999999999999, "host": "x", "since": 1}')
    assert holder_of(path) is None


def test_links_that_lead_out_are_left_alone(tmp_path):
    root, outside = tmp_path / "runs", tmp_path / "outside"
    finished(outside / "data")
    finished(root / "a" / "data")
    (root / "b").symlink_to(outside)
    (root / "a" / "sft").symlink_to(outside / "data")
    (root / "a" / "reward").symlink_to("data")  # within: shared by two stages or runs
    (root / "circle").symlink_to("circle")
    trained(outside / "ppo", steps=2, of=4)
    (root / "a" / "ppo").mkdir()
    (root / "a" / "ppo" / "timings.jsonl").symlink_to(outside / "ppo" / "timings.jsonl")
    assert list(Runs(root).found()) == ["a"]
    found = stages(root)
    states = [found[name].state for name in ("data", "sft", "reward")]
    assert states == ["finished", "missing", "finished"]
    assert (found["ppo"].state, found["ppo"].step) == ("stopped", 0)


def test_a_manifest_is_read_again_when_it_changes(tmp_path):
    folder = finished(tmp_path / "a" / "data", summary={"rows": 1})
    runs = Runs(tmp_path)
    first = runs.stages(tmp_path / "a")[0]
    assert runs.stages(tmp_path / "a")[0].manifest is first.manifest
    (folder / "manifest.json").write_text("[]")
    assert runs.stages(tmp_path / "a")[0].state == "damaged"
