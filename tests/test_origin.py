"""Where a model to start from lies: GGUF files, on their own and in pinned packages."""

import hashlib
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import origin
from pipeline.data.packages import MODELS, Package
from pipeline.errors import UserError
from pipeline.models import load_causal_lm, load_origin
from pipeline.origin import Origin, load_origin_tokenizer, locate
from tests import gguf_files

MEMBER = "some_model/tiny.gguf"
IDS = torch.tensor([[1, 5, 9, 200, 2, 17, 4]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The tiny model as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write_gguf(path, gguf_files.tiny_model())
    return path


@pytest.fixture
def package(file, tmp_path, monkeypatch):
    """A pinned package with that file, its archive in the cache."""
    archive = gguf_files.wheel(MEMBER, file.read_bytes())
    pinned = Package(
        name="some-model",
        version="1.0",
        archive="some_model-1.0.whl",
        sha256=hashlib.sha256(archive).hexdigest(),
        licence="MIT",
    )
    monkeypatch.setenv("RLHF_PIPELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(origin, "MODELS", (pinned,))
    (tmp_path / pinned.archive).write_bytes(archive)
    return pinned


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_gguf_file_becomes_a_plain_model(file, tmp_path):
    model = load_origin(locate(str(file)))
    assert not model.training
    torch.testing.assert_close(logits(model), logits(gguf_files.tiny_model()))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_of_a_gguf_file_can_be_trained(file):
    model = load_origin(locate(str(file))).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_package_is_fetched_and_its_file_unpacked(file, package, tmp_path):
    place = locate(f"package:some-model==1.0/{MEMBER}")
    assert place == Origin(str(tmp_path / "some_model-1.0"), "tiny.gguf")
    assert (tmp_path / "some_model-1.0" / "tiny.gguf").read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "some_model-1.0").iterdir()] == ["tiny.gguf"]


def test_an_altered_file_in_the_cache_is_not_trusted(file, package, tmp_path):
    name = f"package:some-model==1.0/{MEMBER}"
    locate(name)
    (tmp_path / "some_model-1.0" / "tiny.gguf").write_bytes(b"altered")
    locate(name)
    assert (tmp_path / "some_model-1.0" / "tiny.gguf").read_bytes() == file.read_bytes()


def test_an_archive_of_another_hash_is_not_taken(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / package.archive).write_bytes(b"another archive")
    with pytest.raises(UserError, match=r"cannot fetch some-model 1\.0"):
        locate(f"package:some-model==1.0/{MEMBER}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/model.gguf", r"init_from: nowhere/model\.gguf does not exist"),
        ("package:some-model==1.0", r"names no \.gguf file; write package:<name>==<version>/"),
        ("package:some-model==2.0/a.gguf", r"some-model==2\.0 is not pinned .* some-model==1\.0"),
        ("package:some-model==1.0/a.gguf", r"holds no 'a\.gguf'\. Run: python -m zipfile -l"),
    ],
)
def test_what_is_not_there_is_one_line(package, name, message):
    with pytest.raises(UserError, match=message) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_without_the_library_it_is_one_line(file, monkeypatch):
    monkeypatch.setattr(origin, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tiny\.gguf needs the library gguf"):
        locate(str(file))


def test_hub_ids_and_folders_are_left_to_transformers():
    assert locate("owner/name") == Origin("owner/name")


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(UserError, match="init_from: no tokenizer at"):
        load_origin_tokenizer(Origin(str(tmp_path)))


def test_pins_are_complete():
    for package in MODELS:
        assert len(package.sha256) == 64
        assert package.version in package.archive


@pytest.mark.parametrize("name", ["/no/model", "./models/mine", "../mine", "~/mine", "runs/x/sft"])
def test_a_folder_that_is_not_there_is_not_sought_on_the_hub(name):
    with pytest.raises(UserError, match=f"init_from: there is no folder {re.escape(name)} "):
        locate(name)
    with pytest.raises(
        UserError, match=rf"{re.escape(name)}: no model .* \(there is no such folder\)"
    ):
        load_causal_lm(name)


def test_a_name_of_the_hub_is_none_of_a_folder():
    for name in ("gpt2", "owner/name", "owner/name@0123abc", "owner/name@refs/pr/1"):
        assert locate(name) == Origin(name)


def test_a_folder_that_is_there_needs_no_other_sign(tmp_path):
    assert locate(str(tmp_path)) == Origin(str(tmp_path))
