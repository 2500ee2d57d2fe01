"""A finished folder that is made again: whatever ends the new one, a result is never lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint import Artifact, begin, open_artifact
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.stopping import Stopped

SFT = {"stage": "sft", "kind": "causal-lm", "parents": {}}


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A folder without runs."""
    monkeypatch.chdir(tmp_path)


def config(**changes) -> StageConfig:
    return StageConfig(**{"tracking": "none", **changes})


def make(*, text="weights", **changes) -> Artifact:
    """Runs a stage that writes one file; returns its artifact."""
    with begin(config(**changes), **SFT) as run:
        (run.path / "model.txt").write_text(text, encoding="utf-8")
        run.finish("done", chosen={}, summary={}, card="")
    return open_artifact(run.path, kind="causal-lm")


def test_a_finished_result_stays_until_another_takes_its_place():
    before = make(text="first")
    folder = before.path
    with (
        pytest.raises(UserError, match="too long"),
        begin(config(force=True), **SFT) as run,
    ):
        assert not (folder / "manifest.json").exists()
        (run.path / "model.txt").write_text("half", encoding="utf-8")
        raise UserError("too long")
    assert open_artifact(folder, kind="causal-lm").digest == before.digest
    assert make(text="second", force=True).digest != before.digest
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["sft"]


def test_a_full_disk_leaves_nothing_half_made_and_the_former_result():
    before = make()
    with (
        pytest.raises(OSError, match="No space left"),
        begin(config(force=True), **SFT),
    ):
        raise OSError(28, "No space left on device")
    assert open_artifact(before.path, kind="causal-lm").digest == before.digest


ENDS = (RuntimeError("CUDA out of memory"), KeyboardInterrupt(), Stopped("the grace is over"))


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_whatever_ends_a_new_making_before_its_first_point_brings_the_former_result_back(
    end, caplog
):
    before = make()
    with (
        caplog.at_level("INFO"),
        pytest.raises(type(end)),
        begin(config(force=True), **SFT) as run,
    ):
        (run.path / "model.txt").write_text("half", encoding="utf-8")
        raise end
    assert open_artifact(before.path, kind="causal-lm").digest == before.digest
    assert caplog.messages[-1] == "sft: runs/cpu/sft is the finished result from before again"
    with pytest.raises(UpToDate):
        make()


def test_the_former_result_waits_while_there_is_a_point_of_the_new_one():
    make()
    with pytest.raises(KeyboardInterrupt), begin(
        config(force=True), **SFT
    ) as run:  # fmt: skip
        run.save_point(1, lambda folder: (folder / "a").write_text("a", encoding="utf-8"))
        raise KeyboardInterrupt
    assert Path("runs/cpu/sft/checkpoints/step-1").is_dir()
    assert Path("runs/cpu/.sft.former/model.txt").read_text() == "weights"
    assert make(text="second").path.is_dir()
    assert not Path("runs/cpu/.sft.former").exists()


def test_an_interruption_while_the_folder_is_prepared_brings_the_former_result_back(monkeypatch):
    before = make()

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.checkpoint.open_tracker", interrupt)
        make(force=True)
    assert open_artifact(before.path, kind="causal-lm").digest == before.digest
    assert make(text="second", force=True).digest != before.digest


def test_a_result_that_is_finished_stays_whatever_comes_after():
    with (
        pytest.raises(KeyboardInterrupt),
        begin(config(), **SFT) as run,
    ):
        run.finish("done", chosen={}, summary={}, card="")
        raise KeyboardInterrupt
    assert open_artifact(run.path, kind="causal-lm").stage == "sft"


def test_a_crash_without_a_former_result_leaves_its_logs_to_look_at():
    with (
        pytest.raises(RuntimeError, match="a bug"),
        begin(config(), **SFT) as run,
    ):
        run.log(1, {"train/loss": 0.5})
        raise RuntimeError("a bug")
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'


KILLED = """
import os
from pipeline.checkpoint import begin
from pipeline.config import StageConfig
config = StageConfig(tracking="none", force=True)
with begin(config, stage="sft", kind="causal-lm", parents={}) as run:
    (run.path / "model.txt").write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("force", [False, True])
def test_a_killed_making_is_undone_when_the_stage_opens_again(force, monkeypatch):
    before = make()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == -9
    assert Path("runs/cpu/sft/model.txt").read_text() == "half"
    if force:
        assert make(text="second", force=True).digest != before.digest
    else:
        with pytest.raises(UpToDate):
            make()
        assert open_artifact(before.path, kind="causal-lm").digest == before.digest
    assert not Path("runs/cpu/.sft.former").exists()
