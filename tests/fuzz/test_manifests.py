"""Manifests and resume points with any JSON in any place: opened as they are, or one line."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint import Artifact, begin, open_artifact
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.reporting.content import stage_view
from pipeline.storage import sealed
from tests.fuzz.support import as_json, assert_clear, damaged, damaged_bytes, fuzz, one_line

CONFIG = StageConfig(run="run", tracking="none", recipe="none")
LOGGED = {"train/loss": 0.5}


class Stop(Exception):
    """Ends a stage as a kill does."""


@pytest.fixture(scope="module", autouse=True)
def run_folder(tmp_path_factory):
    """A run of three stages of one small file each, in a folder that tests may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("checkout"))
        data = made("data", {})
        made("sft", {"data": data, "pretrain": made("pretrain", {"data": data})})
        yield Path("run")


def made(stage: str, parents: dict[str, Artifact]) -> Artifact:
    with begin(CONFIG, stage=stage, kind="causal-lm", parents=parents) as run:
        (run.path / "model.txt").write_text("weights", encoding="utf-8")
        run.log(1, LOGGED)
        run.finish("made", chosen={}, summary={"loss": {"mean": 0.5}}, card="# Made")
    return open_artifact(run.path, kind="causal-lm")


@st.composite
def changed(draw: st.DrawFn, whole: bytes, how: str) -> bytes:
    """A damaged record: by its bytes, or with any value in any place, sealed anew or not."""
    if how == "bytes":
        return draw(damaged_bytes(whole))
    value = draw(damaged(json.loads(whole)))
    return as_json(sealed(value) if how == "sealed" and isinstance(value, dict) else value)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use(artifact: Artifact) -> None:
    """Does with an opened artifact what stages do with it."""
    assert artifact.digest
    assert artifact.summary is not None
    stage_view(artifact)
    with (
        pytest.raises((Stop, UserError, UpToDate)),
        begin(CONFIG, stage="ppo", kind="causal-lm", parents={"sft": artifact}),
    ):
        raise Stop


@pytest.mark.parametrize("how", ["values", "sealed", "bytes"])
@fuzz(33)
@given(data=st.data())
def test_a_damaged_manifest_opens_or_is_refused_and_costs_nothing(run_folder, how, data):
    path = run_folder / "sft" / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(data.draw(changed(whole, how)))
    try:
        artifact = one_line(lambda: open_artifact(path.parent, kind="causal-lm"))
        if artifact is not None:
            use(artifact)
        before = files_in(path.parent)
        try:
            parents = {
                name: open_artifact(run_folder / name, kind="causal-lm")
                for name in ("data", "pretrain")
            }
            with begin(CONFIG, stage="sft", kind="causal-lm", parents=parents):
                raise Stop
        except (UserError, UpToDate) as error:
            assert_clear(str(error))
            assert files_in(path.parent) == before
        except Stop:
            made("sft", parents)
    finally:
        path.write_bytes(whole)


def interrupted(folder: Path, steps: int) -> None:
    """A stage that saved two points and was then killed."""
    shutil.rmtree(folder / "reward", ignore_errors=True)
    with pytest.raises(Stop), begin(CONFIG, stage="reward", kind="reward", parents={}) as run:
        for step in range(1, steps + 1):
            run.log(step, LOGGED)
            run.save_point(step, lambda point: (point / "state.txt").write_text("state"))
        run.log(steps + 1, LOGGED)
        raise Stop


@pytest.mark.parametrize("how", ["values", "sealed", "bytes"])
@fuzz(20)
@given(data=st.data())
def test_a_damaged_point_is_used_rightly_or_the_one_before_is(run_folder, how, data, caplog):
    interrupted(run_folder, steps=2)
    path = run_folder / "reward" / "checkpoints" / "step-2" / "point.json"
    whole = path.read_bytes()
    path.write_bytes(data.draw(changed(whole, how)))
    caplog.clear()
    with pytest.raises(Stop), begin(CONFIG, stage="reward", kind="reward", parents={}) as run:
        step, point = run.latest_point()
        raise Stop
    log = (run.path / "metrics.jsonl").read_text()
    assert (point / "state.txt").read_text() == "state"
    assert log.count("\n") <= step
    assert run.elapsed_seconds >= 0
    if step == 1:
        refused = [record.getMessage() for record in caplog.records]
        assert any("is not used" in line for line in refused)
        assert log == json.dumps({"step": 1, **LOGGED}) + "\n"
        for line in refused:
            assert_clear(line)


@pytest.mark.parametrize("name", ["step-x", "step-", "step-1.tmp", "step--1", "step-²"])
def test_strangers_among_the_points_are_left_alone(run_folder, name):
    interrupted(run_folder, steps=1)
    stranger = run_folder / "reward" / "checkpoints" / name
    stranger.mkdir()
    (stranger.parent / "step-7").write_text("a file")
    with pytest.raises(Stop), begin(CONFIG, stage="reward", kind="reward", parents={}) as run:
        assert run.latest_point()[0] == 1
        raise Stop
    assert stranger.is_dir()
