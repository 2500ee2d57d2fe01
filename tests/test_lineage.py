"""Lineage: one changed byte of any ancestor is found, and a moved run is the same run."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import Artifact, begin, foreign_artifact, open_artifact
from pipeline.config import StageConfig
from pipeline.errors import UpToDate, UserError
from pipeline.lineage import (
    changed_settings,
    check_ancestors,
    entry_of,
    newer_inputs,
    read_manifest,
    strangers,
    verify,
)
from pipeline.storage import sealed, write_json

CHAIN = {
    "data": ("dataset", ()),
    "tokenizer": ("tokenizer", ("data",)),
    "pretrain": ("causal-lm", ("data", "tokenizer")),
    "sft": ("causal-lm", ("data", "pretrain")),
    "reward": ("reward", ("data", "sft")),
    "ppo": ("causal-lm", ("data", "sft", "reward")),
    "evaluate": ("report", ("data", "pretrain", "sft", "reward", "ppo")),
    "report": ("report", ("data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")),
}
"""Every stage's kind and what it reads, as in the Makefile."""


def opened(run: Path, stage: str) -> dict[str, Artifact]:
    """The parents of a stage, as its `run` opens them."""
    return {name: open_artifact(run / name, kind=CHAIN[name][0]) for name in CHAIN[stage][1]}


def start(run: Path, stage: str, *, text: str = "", force: bool = False, **more: Artifact) -> None:
    """Runs a stage that writes two files, one of them in a folder of its own."""
    config = StageConfig(run=str(run), recipe="nowhere", tracking="none", threads=1, force=force)
    parents = opened(run, stage) | more
    with begin(config, stage=stage, kind=CHAIN[stage][0], parents=parents) as made:
        (made.path / "inner").mkdir()
        (made.path / "inner" / "weights").write_text(f"weights of {stage} {text}")
        made.log(1, {"train/loss": 0.5})
        made.save_point(1, lambda point: (point / "state").write_text("x") and None)
        made.finish("done", chosen={}, summary={}, card="# Card")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose every stage is finished."""
    run = tmp_path_factory.mktemp("lineage") / "run"
    for stage in CHAIN:
        start(run, stage)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, somewhere else."""
    return shutil.copytree(finished, tmp_path / "copy")


def ancestors(stage: str) -> set[str]:
    """Everything a stage was made from."""
    parents = set(CHAIN[stage][1])
    return parents.union(*(ancestors(parent) for parent in parents))


def flip(path: Path, position: int) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ancestor", list(CHAIN)[:-1])
def test_a_changed_byte_of_any_file_stops_every_later_stage(run, ancestor):
    files = [run / ancestor / name for name in entry_of(run / ancestor).files]
    assert {path.name for path in files} == {"weights", "metrics.jsonl"}
    later = [stage for stage in CHAIN if ancestor in ancestors(stage)]
    for path in files:
        for position in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            flip(path, position)
            for stage in later:
                with pytest.raises(UserError) as caught:
                    start(run, stage)
                assert str(path) in str(caught.value)
                assert str(caught.value).endswith(f"Run: make {ancestor} RUN={run} FORCE=1")
            flip(path, position)
    for stage in later:
        with pytest.raises(UpToDate):
            start(run, stage)


@pytest.mark.parametrize("ancestor", ["tokenizer", "pretrain"])
def test_a_changed_byte_of_a_manifests_content_stops_what_does_not_read_it(run, ancestor):
    path = run / ancestor / "manifest.json"
    text = path.read_text()
    later = [s for s in CHAIN if ancestor in ancestors(s) - set(CHAIN[s][1])]
    assert len(later) >= 2
    for position in [at for at in range(len(text)) if not text[at].isspace()][::5]:
        flip(path, position)
        for stage in later:
            with pytest.raises(UserError, match=r"manifest.json.* [Rr]un: make \w+ RUN=.* FORCE=1"):
                start(run, stage)
        flip(path, position)


@pytest.mark.parametrize("change", [{"seed": 2}, {"config": {}}, {"parents": {}}, {"files": {}}])
def test_a_changed_manifest_of_a_parent_is_told_by_what_others_recorded(run, change):
    path = run / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"] |= change
    write_json(path, sealed(manifest))
    for stage in ("ppo", "evaluate", "report"):
        with pytest.raises(UserError, match=f"{run}/sft.* Run: make "):
            start(run, stage)


def test_a_rebuilt_ancestor_stops_what_comes_after_its_children(run):
    start(run, "pretrain", text="other", force=True)
    told = (
        f"{run}/pretrain/manifest.json is not the one that {run}/sft was made from. Run: make sft"
    )
    with pytest.raises(UserError, match=told):
        start(run, "reward")
    for stage in ("sft", "reward", "ppo"):
        start(run, stage)
    _, findings = verify(run / "evaluate")
    assert {(finding.state, finding.text.split()[5]) for finding in findings} == {
        ("stale", name) for name in ("pretrain", "sft", "reward", "ppo")
    }


def test_a_broken_manifest_of_an_ancestor_names_the_command_that_makes_it(run):
    (run / "pretrain" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"pretrain/manifest.json .*Run: make pretrain .*FORCE=1"):
        start(run, "ppo")


def test_an_unfinished_ancestor_stops_too(run):
    (run / "pretrain" / "manifest.json").unlink()
    with pytest.raises(UserError, match="pretrain has no manifest.json.* Run: make pretrain"):
        start(run, "ppo")


def test_an_ancestor_that_is_gone_is_said_once_and_stops_nothing(run, caplog):
    for stage in ("tokenizer", "pretrain"):
        shutil.rmtree(run / stage)
    with pytest.raises(UpToDate):
        start(run, "ppo")
    assert caplog.messages == [f"not verified, because it is gone: {run}/pretrain"]
    with pytest.raises(UserError, match="pretrain does not exist"):
        start(run, "sft")


def test_what_lies_outside_the_run_is_no_ancestor_to_look_for(run, tmp_path):
    (tmp_path / "base.txt").write_text("weights")
    base = foreign_artifact(tmp_path / "base.txt", kind="model")
    start(run, "tokenizer", force=True, **{"tokenizer/init_from": base})
    check_ancestors({"tokenizer": open_artifact(run / "tokenizer", kind="tokenizer")})
    entry, findings = verify(run / "tokenizer")
    assert findings == []
    assert [(link.name, link.is_beside, link.found == "") for link in entry.links] == [
        ("data", True, False),
        ("tokenizer/init_from", False, True),
    ]


@pytest.mark.parametrize("name", ["../data", "..", ".", "", "inner/data"])
def test_a_parents_name_cannot_lead_out_of_the_run(run, tmp_path, name):
    shutil.copytree(run / "data", tmp_path / "data")
    shutil.copy(run / "data" / "manifest.json", run)
    path = run / "tokenizer" / "manifest.json"
    manifest = json.loads(path.read_text())
    record = manifest["content"]["parents"].pop("data")
    manifest["content"]["parents"][name] = record | {"stage": name}
    write_json(path, sealed(manifest))
    entry, _ = verify(run / "tokenizer")
    assert [(link.is_beside, link.found) for link in entry.links] == [(False, "")]


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_run_that_was_moved_or_copied_verifies(run, tmp_path, how):
    how(run, tmp_path / "elsewhere" / "named")
    for stage in CHAIN:
        entry, findings = verify(tmp_path / "elsewhere" / "named" / stage)
        assert findings == []
        assert all(link.found == link.recorded for link in entry.links)


def test_nothing_that_is_digested_holds_a_place(finished):
    for stage in CHAIN:
        content = json.dumps(read_manifest(finished / stage)["content"])
        assert str(finished.parent) not in content
        assert str(Path.cwd()) not in content


def test_verify_names_every_fault(run, monkeypatch):
    (run / "sft" / "inner" / "weights").unlink()
    flip(run / "sft" / "metrics.jsonl", 0)
    texts = [finding.text for finding in verify(run / "sft")[1]]
    assert texts == ["inner/weights is missing", "metrics.jsonl was altered"]
    entry, findings = verify(run / "nothing")
    assert (entry, [finding.state for finding in findings]) == (None, ["missing"])
    (run / "sft" / "manifest.json").unlink()
    assert [finding.state for finding in verify(run / "sft")[1]] == ["unfinished"]


def test_a_file_that_cannot_be_read_is_named(run, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pipeline.storage.sha256_file", refuse)
    texts = [finding.text for finding in verify(run / "data")[1]]
    assert "inner/weights cannot be read (Permission denied)" in texts


@pytest.mark.parametrize("part", ["stage", "kind", "config", "parents", "files", "circumstances"])
def test_a_manifest_without_a_part_is_damaged(run, part):
    path = run / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    (manifest if part == "circumstances" else manifest["content"]).pop(part)
    write_json(path, sealed(manifest))
    with pytest.raises(UserError, match=f"manifest.json is damaged: no {part}"):
        read_manifest(run / "data")
    assert [finding.state for finding in verify(run / "data")[1]] == ["altered"]


def test_settings_that_differ_are_named_with_both_values():
    recorded = {"seed": 1, "training": {"steps": 30, "rate": 0.1}, "gone": True}
    wanted = {"seed": 1, "training": {"steps": 40, "rate": 0.1}, "new": 5, "newer": 6}
    assert changed_settings(recorded, wanted, defaults={"new": 5, "newer": 0, "seed": 9}) == [
        "gone: True when made, None now",
        "newer: 0 when made, 6 now",
        "training.steps: 30 when made, 40 now",
    ]


def test_newer_is_what_make_takes_for_newer(run, tmp_path):
    yaml, manifest = tmp_path / "sft.yaml", run / "sft" / "manifest.json"
    yaml.write_text("")
    times = manifest.stat().st_mtime_ns
    os.utime(yaml, ns=(times, times))
    assert newer_inputs(run / "sft", [yaml, tmp_path / "none.yaml"]) == []
    os.utime(yaml, ns=(times, times + 1))
    assert newer_inputs(run / "sft", [yaml]) == [yaml]


def test_strangers_are_files_that_the_stage_did_not_make(run):
    (run / "sft" / "notes.txt").write_text("mine")
    (run / "sft" / ".hidden").write_text("a tool's")
    assert strangers(run / "sft", entry_of(run / "sft")) == ["notes.txt"]
