"""A model on the hub: fetched file by file as data, checked as a folder is. The hub is a fake."""

import fnmatch
import shutil

import huggingface_hub
import pytest

from pipeline import pretrained
from pipeline.errors import UserError
from pipeline.models import load_causal_lm, load_tokenizer
from pipeline.origin import origin_commit
from pipeline.pretrained import commit_of
from tests.evaluation.fakes import save_language_model
from tests.security.plants import change, plant_code, plant_torch

NAME, COMMIT = "owner/name", "0123abc"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model as it lies on the hub; `fetched` gets the files that are asked for."""
    source, cache = save_language_model(tmp_path / "hub"), tmp_path / "snapshots" / COMMIT

    def snapshot_download(name, *, revision, allow_patterns):
        assert (name, revision) in ((NAME, None), (NAME, COMMIT))
        cache.mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*"):
            inner = path.relative_to(source)
            if path.is_file() and any(fnmatch.fnmatch(str(inner), one) for one in allow_patterns):
                (cache / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / inner)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(pretrained, "_commits", {})
    monkeypatch.chdir(tmp_path)
    pretrained.permit(())
    yield source
    pretrained.permit(())


def fetched(hub):
    return {path.name for path in (hub.parent / "snapshots" / COMMIT).iterdir()}


def test_a_process_goes_on_with_the_commit_that_it_has_read(hub, monkeypatch):
    asked, download = [], huggingface_hub.snapshot_download

    def noted(name, *, revision, allow_patterns):
        asked.append(revision)
        return download(name, revision=revision, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    load_causal_lm(NAME)
    assert commit_of(NAME) == COMMIT
    assert asked == [None, *[COMMIT] * (len(asked) - 1)]
    assert len(asked) == 3  # what describes the model, its weights, and the question


def test_a_commit_pins_the_model_and_is_told(hub):
    pinned = f"{NAME}@{COMMIT}"
    assert load_causal_lm(pinned).num_parameters() > 0
    for name in (pinned, NAME):
        assert commit_of(name) == COMMIT
        assert origin_commit(name) == {"init_from_commit": COMMIT}
    assert commit_of(hub) is None
    assert origin_commit(str(hub)) == origin_commit("") == {}
    with pytest.raises(UserError, match="owner/name@another"):
        load_causal_lm(f"{NAME}@another")


def test_weights_and_tokenizer_come_and_nothing_else(hub):
    plant_torch(hub / "pytorch_model.bin", hub.parent / "mark")
    (hub / "modeling_planted.py").touch()
    shutil.copy(hub / "model.safetensors", hub / "consolidated.safetensors")
    assert load_tokenizer(NAME).eos_token_id is not None
    assert "model.safetensors" not in fetched(hub)
    assert load_causal_lm(NAME).num_parameters() > 0
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched(hub)
    assert not {"pytorch_model.bin", "modeling_planted.py", "consolidated.safetensors"} & fetched(
        hub
    )


def test_weights_in_several_files(hub):
    model = load_causal_lm(hub)
    (hub / "model.safetensors").unlink()
    model.save_pretrained(hub, max_shard_size="10KB")
    assert load_causal_lm(NAME).num_parameters() == model.num_parameters()


def test_pickled_weights_are_refused(hub):
    (hub / "model.safetensors").unlink()
    plant_torch(hub / "pytorch_model.bin", hub.parent / "mark")
    with pytest.raises(UserError, match="owner/name: no model could be loaded .* safetensors"):
        load_causal_lm(NAME)
    change(hub / "model.safetensors.index.json", weight_map={"a": "pytorch_model.bin"})
    with pytest.raises(UserError, match="said to lie in 'pytorch_model.bin'"):
        load_causal_lm(NAME)
    assert "pytorch_model.bin" not in fetched(hub)


def test_an_adapter_is_refused(hub):
    change(hub / "adapter_config.json", base_model_name_or_path="another/model")
    with pytest.raises(UserError, match="owner/name is an adapter. Merge it into its base"):
        load_causal_lm(NAME)


def test_code_is_not_even_fetched_unless_permitted(hub, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(hub.parent / "modules")
    )
    plant_code(hub, hub.parent / "mark")
    with pytest.raises(UserError, match=r"set trust_remote_code: \[owner/name\]"):
        load_causal_lm(NAME)
    assert "modeling_planted.py" not in fetched(hub)
    pretrained.permit([NAME])
    load_causal_lm(NAME)
    assert (hub.parent / "mark").exists()
