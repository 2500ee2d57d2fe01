"""The run-folder contract: manifests, verification, lineage, logs and resume points."""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import distributed
from pipeline.checkpoint import begin, open_artifact
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.manifest import mending_command, remember_recipe
from pipeline.stopping import Stopped
from pipeline.training import Training


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A checkout with a recipe whose YAML files are old."""
    monkeypatch.chdir(tmp_path)
    for stage in ("sft", "reward", "ppo"):
        path = tmp_path / "configs" / "cpu" / f"{stage}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("seed: 1\n", encoding="utf-8")
        os.utime(path, (1, 1))


def config(**changes) -> StageConfig:
    return StageConfig(**{"tracking": "none", **changes})


def make(stage="sft", *, kind="causal-lm", parents=None, text="weights", **changes):
    """Runs a stage that writes one file; returns its artifact."""
    with begin(config(**changes), stage=stage, kind=kind, parents=parents or {}) as run:
        (run.path / "model.txt").write_text(text, encoding="utf-8")
        run.log(1, {"train/loss": 0.5})
        run.finish("done", chosen={"precision": "fp32"}, summary={"loss": 0.5}, card="# Card")
    return open_artifact(run.path, kind=kind)


def test_a_finished_folder_opens_with_its_record(caplog):
    with caplog.at_level("INFO"):
        artifact = make()
    assert artifact.path == Path("runs/cpu/sft")
    assert (artifact.stage, artifact.kind, artifact.summary) == ("sft", "causal-lm", {"loss": 0.5})
    assert artifact.config["seed"] == 1
    assert set(artifact.content["files"]) == {"model.txt", "metrics.jsonl"}
    assert artifact.content["chosen"] == {"precision": "fp32"}
    assert artifact.manifest["circumstances"]["wall_seconds"] >= 0
    assert (artifact.path / "README.md").read_text(encoding="utf-8") == "# Card\n"
    assert caplog.records[-1].getMessage() == "sft: done -> runs/cpu/sft"


def test_the_main_process_verifies_a_parent_and_finds_the_point_for_all(monkeypatch):
    artifact = make()
    with begin(config(), stage="reward", kind="reward", parents={}) as run:
        with monkeypatch.context() as other:
            other.setattr(distributed, "is_main", lambda: False)
            other.setattr(distributed, "gather_objects", lambda _: [artifact])
            (artifact.path / "model.txt").unlink()
            assert open_artifact(artifact.path, kind="causal-lm") is artifact
            other.setattr(distributed, "gather_objects", lambda _: [(7, Path("there"))])
            assert run.latest_point() == (7, Path("there"))
            other.setattr(distributed, "gather_objects", lambda _: [("fp32", {"it": "bf16"})])
            assert run.points.choose("it", "auto", lambda: "fp32") == "bf16"
        run.finish("done", chosen={}, summary={}, card="# Card")


def test_the_same_content_has_the_same_digest_wherever_and_whenever_it_is_made():
    first = make()
    second = make(run="elsewhere")
    assert first.digest == second.digest
    assert make(run="third", seed=2).digest != first.digest
    assert make(run="fourth", text="other weights").digest != first.digest


def test_a_moved_folder_still_verifies(tmp_path):
    artifact = make()
    moved = tmp_path / "moved"
    shutil.move(artifact.path, moved)
    assert open_artifact(moved, kind="causal-lm").digest == artifact.digest


def test_a_missing_folder_names_the_command():
    with pytest.raises(UserError, match="runs/cpu/sft does not exist. Run: make sft RECIPE=cpu"):
        open_artifact(Path("runs/cpu/sft"), kind="causal-lm")
    with pytest.raises(UserError, match="Run: make sft RUN=else/where"):
        open_artifact(Path("else/where/sft"), kind="causal-lm")


def test_a_run_elsewhere_is_mended_with_the_recipe_it_has(monkeypatch):
    monkeypatch.setattr("pipeline.manifest._recipes", {})
    remember_recipe(Path("else/where"), "smoke")
    assert mending_command(Path("runs/cpu/sft")) == "make sft RECIPE=cpu"
    remember_recipe(Path("runs/cpu"), "smoke")
    assert mending_command(Path("else/where/sft")) == "make sft RECIPE=smoke RUN=else/where"
    assert mending_command(Path("runs/cpu/sft")) == "make sft RECIPE=smoke RUN=runs/cpu"
    assert mending_command(Path("other/sft")) == "make sft RUN=other"


def test_an_unfinished_folder_is_refused():
    make().path.joinpath("manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest.json, so that stage did not finish"):
        open_artifact(Path("runs/cpu/sft"), kind="causal-lm")


def test_another_kind_is_refused():
    make()
    with pytest.raises(UserError, match="is a causal-lm folder, but a reward folder is needed"):
        open_artifact(Path("runs/cpu/sft"), kind="reward")


@pytest.mark.parametrize("text", ["Weights", "weights and more", ""])
def test_an_altered_file_is_named(text):
    path = make().path / "model.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="model.txt was altered after .* make sft .*FORCE=1"):
        open_artifact(path.parent, kind="causal-lm")


def test_a_removed_file_is_named():
    path = make().path / "model.txt"
    path.unlink()
    with pytest.raises(UserError, match="model.txt is missing"):
        open_artifact(path.parent, kind="causal-lm")


@pytest.mark.parametrize("text", ["{", "[]", '{"content": {"format_version": 99}}'])
def test_a_broken_or_foreign_manifest_is_refused(text):
    path = make().path / "manifest.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="manifest.json is not"):
        open_artifact(path.parent, kind="causal-lm")


def test_the_same_command_again_is_up_to_date():
    make()
    with pytest.raises(UpToDate, match="runs/cpu/sft is up to date"):
        make()


def test_other_command_line_settings_are_refused_saying_what_differs():
    make(seed=1)
    with pytest.raises(UserError, match=r"seed: 1 there, 2 here.*FORCE=1") as caught:
        make(seed=2, overrides=("seed=2",))
    assert "threads" not in str(caught.value)
    assert make(seed=2, overrides=("seed=2",), force=True).config["seed"] == 2


def test_a_touched_yaml_or_parent_rebuilds():
    sft = make()
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    os.utime("configs/cpu/sft.yaml")
    sft = make()
    make("reward", kind="reward", parents={"sft": sft})
    with pytest.raises(UpToDate):
        make("reward", kind="reward", parents={"sft": sft})
    time.sleep(0.02)
    os.utime(sft.path / "manifest.json")
    make("reward", kind="reward", parents={"sft": sft})


def test_an_edited_yaml_rebuilds_though_the_settings_differ():
    make(seed=1)
    assert make(seed=3).config["seed"] == 3


def test_parents_that_do_not_belong_together_are_refused():
    sft = make()
    reward = make("reward", kind="reward", parents={"sft": sft})
    other = make(seed=2, force=True)
    with pytest.raises(UserError, match="reward was made from another sft .* make reward"):
        make("ppo", parents={"sft": other, "reward": reward})


def test_a_users_mistake_leaves_nothing_behind():
    with (
        pytest.raises(UserError, match="too long"),
        begin(config(), stage="sft", kind="causal-lm", parents={}) as run,
    ):
        (run.path / "half.txt").write_text("half", encoding="utf-8")
        raise UserError("too long")
    assert not run.path.exists()


class Killed(Exception):
    """Stands for the end of the process."""


def interrupted(*steps, stop, **changes):
    """Runs a stage that counts in a file, saving a point every step, and dies after `stop`."""
    started = []
    with begin(config(**changes), stage="sft", kind="causal-lm", parents={}) as run:
        point = run.latest_point()
        done = 0 if point is None else int((point[1] / "count").read_text(encoding="utf-8"))
        started.append(done)
        for step in steps[done:]:
            run.log(step, {"a/b": float(step)})
            run.log_samples(step, [{"text": "é"}])
            if step > stop:
                raise Killed
            run.save_point(
                step, lambda path, s=step: (path / "count").write_text(str(s), encoding="utf-8")
            )
        run.finish("done", chosen={}, summary={}, card="")
    return started[0]


def rows(name="metrics.jsonl"):
    text = Path("runs/cpu/sft", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_an_interrupted_stage_goes_on_without_a_double_or_missing_row(caplog):
    with pytest.raises(Killed):
        interrupted(1, 2, 3, 4, stop=2)
    assert [row["step"] for row in rows()] == [1, 2, 3]
    with caplog.at_level("INFO"):
        assert interrupted(1, 2, 3, 4, stop=9) == 2
    assert "sft: goes on from step 2 of runs/cpu/sft" in caplog.messages
    assert [row["step"] for row in rows()] == [1, 2, 3, 4]
    assert [row["step"] for row in rows("samples.jsonl")] == [1, 2, 3, 4]


def test_precision_is_chosen_once_and_kept_to_on_another_machine(monkeypatch, caplog):
    @dataclass(frozen=True, kw_only=True)
    class Trained(StageConfig):
        training: Training = field(default_factory=Training)

    def chosen(machine: str, *, stop: bool, wanted: str = "auto", **changes) -> str:
        monkeypatch.setattr(
            "pipeline.models.choose_precision", lambda name: machine if name == "auto" else name
        )
        settings = Trained(tracking="none", training=Training(precision=wanted), **changes)
        with caplog.at_level("INFO"), begin(settings, stage="sft", kind="x", parents={}) as run:
            resolved = run.resolved(settings)
            if not run.latest_point():
                run.save_point(1, lambda path: (path / "count").write_text("1"))
            if stop:
                raise Killed
            run.finish("done", chosen=run.points.chosen, summary={}, card="")
        return resolved.training.precision

    with pytest.raises(Killed):
        chosen("bf16", stop=True)
    assert chosen("fp32", stop=False) == "bf16"
    assert "sft: goes on with precision bf16, as it began; here it would be fp32" in caplog.messages
    artifact = open_artifact(Path("runs/cpu/sft"), kind="x")
    assert artifact.content["chosen"] == {"precision": "bf16"}
    assert artifact.config["training"]["precision"] == "auto"
    assert chosen("fp32", stop=False, force=True) == "fp32"  # begins anew
    assert chosen("fp32", stop=False, wanted="bf16", run="named") == "bf16"


def test_a_setting_that_is_given_is_not_measured():
    settings = StageConfig(tracking="none")
    with begin(settings, stage="sft", kind="x", parents={}) as run:
        assert run.points.choose("attention", "bf16", lambda: pytest.fail("measured")) == "bf16"
        assert run.points.choose("precision", "auto", lambda: "fp32") == "fp32"
        assert run.points.chosen == {"attention": "bf16", "precision": "fp32"}
        run.finish("done", chosen=run.points.chosen, summary={}, card="")


def test_only_the_last_points_are_kept():
    interrupted(1, 2, 3, 4, 5, stop=9)
    kept = {path.name for path in Path("runs/cpu/sft/checkpoints").iterdir()}
    assert kept == {"step-4", "step-5"}


@pytest.mark.parametrize("damage", ["truncate", "remove", "foreign", "point"])
def test_a_damaged_point_is_named_and_the_one_before_is_taken(damage, caplog):
    with pytest.raises(Killed):
        interrupted(1, 2, 3, 4, stop=3)
    folder = Path("runs/cpu/sft/checkpoints/step-3")
    if damage == "truncate":
        (folder / "count").write_text("", encoding="utf-8")
    elif damage == "remove":
        (folder / "count").unlink()
    elif damage == "foreign":
        (folder / "stranger").write_text("x", encoding="utf-8")
    else:
        (folder / "point.json").write_text("{", encoding="utf-8")
    with caplog.at_level("INFO"):
        assert interrupted(1, 2, 3, 4, stop=9) == 2
    assert any("step-3 is not used" in line for line in caplog.messages)
    assert [row["step"] for row in rows()] == [1, 2, 3, 4]


def test_points_of_other_settings_are_thrown_away_only_when_told_so():
    with pytest.raises(Killed):
        interrupted(1, 2, 3, stop=2)
    with pytest.raises(
        UserError, match=r"step-2 was made with other settings \(seed: 1 .* FORCE=1"
    ):
        interrupted(1, 2, 3, stop=9, seed=5)
    assert [row["step"] for row in rows()] == [1, 2, 3]
    assert interrupted(1, 2, 3, stop=9, seed=5, force=True) == 0


def test_points_of_other_parents_are_not_used(caplog):
    parents = {"sft": make()}

    def run(stop):
        with begin(config(), stage="ppo", kind="causal-lm", parents=parents) as stage:
            found = stage.latest_point()
            stage.save_point(1, lambda folder: (folder / "a").write_text("a", encoding="utf-8"))
            if stop:
                raise Killed
            stage.finish("done", chosen={}, summary={}, card="")
        return found

    with pytest.raises(Killed):
        run(stop=True)
    parents = {"sft": make(text="others", force=True)}
    assert run(stop=False) is None
    assert any("belongs to another configuration" in line for line in caplog.messages)


def test_a_half_written_point_is_ignored():
    with pytest.raises(Killed):
        interrupted(1, 2, 3, stop=1)
    half = Path("runs/cpu/sft/checkpoints/.step-2.tmp")
    half.mkdir()
    (half / "count").write_text("2", encoding="utf-8")
    assert interrupted(1, 2, 3, stop=9) == 1


def test_a_stage_folder_that_is_a_link_stays_one(tmp_path):
    elsewhere = tmp_path / "scratch" / "sft"
    elsewhere.mkdir(parents=True)
    Path("runs/cpu").mkdir(parents=True)
    Path("runs/cpu/sft").symlink_to(elsewhere)
    make(text="first")
    make(text="second", force=True)
    assert Path("runs/cpu/sft").is_symlink()
    assert (elsewhere / "model.txt").read_text() == "second"


def test_any_flipped_bit_of_a_manifest_is_seen():
    path = make().path / "manifest.json"
    text = path.read_bytes()
    for place in range(len(text)):
        data = bytearray(text)
        data[place] ^= 1
        path.write_bytes(bytes(data))
        if text[place : place + 1] not in b" \n":  # white space says nothing
            with pytest.raises(
                UserError, match=r"manifest.json|is missing|was altered|is a .*folder"
            ):
                open_artifact(path.parent, kind="causal-lm")
    path.write_bytes(text)
    assert open_artifact(path.parent, kind="causal-lm").stage == "sft"


def test_a_stage_does_not_begin_on_a_full_disk(monkeypatch):
    with begin(config(), stage="sft", kind="causal-lm", parents={}) as run:
        run.finish("done", chosen={}, summary={}, card="")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 1e6))
    message = r"the files of sft need 0.05 GB and 0.00 GB are free"
    with (
        pytest.raises(UserError, match=message),
        begin(config(force=True), stage="sft", kind="causal-lm", parents={}),
    ):
        raise AssertionError("it began")
    assert open_artifact(run.path, kind="causal-lm").stage == "sft"  # and nothing was touched


def test_room_for_points_and_result_is_checked_before_training(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 0, 9e9))
    with begin(config(), stage="sft", kind="causal-lm", parents={}) as run:
        # Two points and one in the making, of three copies each, and the model: 10 GB.
        run.require_space(1_000_000_000, 0)
        with pytest.raises(UserError, match=r"need 10.00 GB and 9.00 GB are free. Free some space"):
            run.require_space(1_000_000_000, 1_000_000_000)
        run.finish("done", chosen={}, summary={}, card="")


def test_a_stage_that_is_asked_to_stop_goes_on_from_its_point():
    with (
        pytest.raises(Stopped, match="SIGTERM: stopped after step 1, which is saved"),
        begin(config(), stage="sft", kind="causal-lm", parents={}) as run,
    ):
        run.save_point(1, lambda path: (path / "a").write_text("a", encoding="utf-8"))
        run.stop(1, "SIGTERM")
    with begin(config(), stage="sft", kind="causal-lm", parents={}) as run:
        assert run.latest_point() == (1, run.path / "checkpoints" / "step-1")
        run.finish("done", chosen={}, summary={}, card="")


def test_a_stage_at_work_locks_its_folder_and_a_finished_one_does_not():
    with begin(config(), stage="sft", kind="causal-lm", parents={}) as run:
        assert json.loads(Path("runs/cpu/.sft.lock").read_text())["pid"] == os.getpid()
        run.finish("done", chosen={}, summary={}, card="")
    assert Path("runs/cpu/.sft.lock").read_text() == ""
