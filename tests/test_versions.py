"""Formats on disk: a sample of each opens, and of an unknown one one line says what wrote it."""

import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import begin, open_artifact
from pipeline.errors import UserError
from pipeline.lineage import check_ancestors, verify
from pipeline.manifest import FORMAT_VERSION, read_manifest
from pipeline.storage import files_of, read_json, write_json
from tests.samples.make import KINDS, PRESENT, SAMPLES, STEPS, config_of, make, parents_of

FORMATS = sorted(SAMPLES.glob("format-*"))
DIGESTS = {
    "format-1": {
        "data": "e96dc17cfc1c70c4f9119e91ae54e9dd5a5ce2b23bd9ef68a73207c21e7acc9c",
        "sft": "299a232fc2f872a6a9b368800b585923dec3e861aa5dc784c09fa39b48ca1af6",
    },
    "format-2": {
        "data": "2e21477c64d1181bc1cad11addc9dadd3a6c0af938ca173b87579a1881129c4c",
        "sft": "f717a224526aed07bee3dff044c161306e0104873f547de1b916ccba13f44d8a",
    },
}
DIGESTS["format-3"] = DIGESTS["format-2"]  # it has resume points of another format only
"""Of the samples' content, as they were when they were written."""


def test_there_is_a_sample_of_the_present_format_and_it_is_what_is_written_now(tmp_path):
    assert PRESENT in FORMATS
    make(tmp_path / "run")
    for stage in KINDS:
        now = read_json(tmp_path / "run" / stage / "manifest.json")
        then = read_json(PRESENT / stage / "manifest.json")
        assert now["content"] == then["content"]
    place = Path("sft") / "checkpoints" / f"step-{STEPS}" / "point.json"
    now, then = read_json(tmp_path / "run" / place), read_json(PRESENT / place)
    assert now.keys() == then.keys()
    assert now["format_version"] == then["format_version"]


@pytest.mark.parametrize("sample", FORMATS, ids=lambda path: path.name)
def test_a_finished_folder_of_every_format_opens_and_verifies(sample):
    for stage, kind in KINDS.items():
        artifact = open_artifact(sample / stage, kind=kind)
        assert (artifact.stage, artifact.digest) == (stage, DIGESTS[sample.name][stage])
        entry, findings = verify(sample / stage)
        assert findings == []
        assert entry.digest == artifact.digest
    assert entry.links[0].found == entry.links[0].recorded == DIGESTS[sample.name]["data"]
    check_ancestors({"sft": artifact})


@pytest.mark.parametrize("sample", FORMATS, ids=lambda path: path.name)
def test_a_resume_point_of_every_format_is_gone_on_from(sample, tmp_path, caplog):
    run = shutil.copytree(sample, tmp_path / "run")
    (run / "sft" / "manifest.json").unlink()
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    caplog.set_level("INFO")
    with begin(config_of(run), stage="sft", kind=KINDS["sft"], parents=parents_of(run)) as stage:
        step, folder = stage.latest_point()
        assert (step, (folder / "state.txt").read_text()) == (STEPS, "state\n")
        stage.finish("went on", chosen={}, summary={}, card="# Sample")
    assert f"goes on from step {STEPS}" in caplog.text
    assert (run / "sft" / "metrics.jsonl").read_text().count("\n") == STEPS


def test_a_point_without_a_version_is_of_the_first():
    folder = SAMPLES / "format-1" / "sft" / "checkpoints" / f"step-{STEPS}"
    point = read_json(folder / "point.json")
    assert point.get("format_version", 1) == 1
    assert files_of(folder) == point["files"]
    assert set(point) == {"step", "key", "elapsed_seconds", "logs", "files"}


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "x", -1, [1]])
def test_a_manifest_of_another_format_is_refused_in_one_line(version, tmp_path):
    run = shutil.copytree(PRESENT, tmp_path / "run")
    path = run / "sft" / "manifest.json"
    manifest = read_json(path)
    manifest["content"]["format_version"] = version
    write_json(path, manifest)
    with pytest.raises(UserError) as caught:
        open_artifact(run / "sft", kind=KINDS["sft"])
    told = str(caught.value)
    assert f"{path} is not of format {FORMAT_VERSION}" in told
    assert f"but of {version!r}: read it with" in told
    assert "the version that wrote it (commit " in told
    assert manifest["circumstances"]["git_commit"] in told
    assert told.endswith(f"or run: make sft RUN={run} FORCE=1")
    _, findings = verify(run / "sft")
    assert [finding.state for finding in findings] == ["altered"]
    assert f"but of {version!r}" in findings[0].text


@pytest.mark.parametrize("text", ["[]", "{}", '{"content": []}', '{"content": {}}', "1"])
def test_what_names_no_format_is_not_a_manifest(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a manifest: it names no format \(this version"):
        read_manifest(tmp_path)


def test_a_format_without_circumstances_has_an_unknown_commit(tmp_path):
    write_json(tmp_path / "manifest.json", {"content": {"format_version": 9}})
    with pytest.raises(UserError, match=r"\(commit unknown\)"):
        read_manifest(tmp_path)


def test_a_manifest_of_the_present_format_without_its_seal_is_refused(tmp_path):
    run = shutil.copytree(PRESENT, tmp_path / "run")
    manifest = read_json(run / "sft" / "manifest.json")
    del manifest["sha256"]
    write_json(run / "sft" / "manifest.json", manifest)
    with pytest.raises(UserError, match="manifest.json was altered"):
        open_artifact(run / "sft", kind=KINDS["sft"])
