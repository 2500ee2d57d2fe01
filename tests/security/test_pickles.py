"""A malicious pickle never runs, wherever one could be met, and the user reads why in one line."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import begin, open_artifact
from pipeline.config import StageConfig
from pipeline.data.files import OwnRows
from pipeline.errors import UserError
from pipeline.evaluation.sampling import load_any
from pipeline.lora import check_adapter
from pipeline.models import load_causal_lm, load_classifier, load_origin, load_tokenizer
from pipeline.origin import load_origin_tokenizer, locate
from pipeline.storage import files_of, read_json, sealed, write_json
from tests.data.own import read_own
from tests.evaluation.fakes import save_language_model
from tests.ppo import worlds
from tests.security.plants import change, plant, plant_torch
from tests.support import tiny_llama

PLANTS = {"pickle": plant, "torch": plant_torch}


@pytest.fixture
def mark(tmp_path):
    """What a bomb makes; it must not be there at the end."""
    path = tmp_path / "the-pickle-ran"
    yield path
    assert not path.exists()


def refused(action, *words: str) -> str:
    """The one line in which an action is refused; it holds all the words."""
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert all(word in line for word in words), line
    assert "\n" not in line
    return line


@pytest.mark.parametrize("kind", PLANTS)
def test_the_trap_is_real(tmp_path, kind):
    file = PLANTS[kind](tmp_path / "bomb", tmp_path / "mark")
    if kind == "torch":
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert (tmp_path / "mark").exists()


LOADERS = {
    "init_from": lambda folder: load_origin(locate(str(folder))),
    "a reward source": load_classifier,
    "a language model": load_causal_lm,
    "chat and generate.model": lambda folder: load_any(str(folder)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", PLANTS)
def test_pickled_weights_are_not_loaded(tmp_path, mark, loader, kind):
    folder = save_language_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    change(folder / "config.json", id2label={"0": "score"}, label2id={"score": 0})
    PLANTS[kind](folder / "pytorch_model.bin", mark)
    refused(lambda: LOADERS[loader](folder), str(folder), "pytorch_model.bin", "safetensors")


def test_harmless_pickled_weights_are_refused_too(tmp_path):
    folder = save_language_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    refused(lambda: load_causal_lm(folder), "no model could be loaded", "pytorch_model.bin")


@pytest.mark.parametrize("where", ["index of safetensors", "index of pickles", "config", "adapter"])
def test_no_detour_leads_to_a_pickle(tmp_path, mark, where):
    folder = save_language_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    if where == "config":  # Transformers takes this one name for a pickle of weights
        change(folder / "config.json", transformers_weights="adapter_model.bin")
        plant_torch(folder / "adapter_model.bin", mark)
    elif where == "adapter":  # Transformers would load it on top of the model
        change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="x")
        plant_torch(folder / "adapter_model.bin", mark)
    else:
        weights.unlink()
        named = "model.safetensors" if where == "index of safetensors" else "pytorch_model.bin"
        plant_torch(folder / "shard.bin", mark)
        places = {"model.embed_tokens.weight": "shard.bin"}
        change(folder / f"{named}.index.json", metadata={}, weight_map=places)
    refused(lambda: load_causal_lm(folder), str(folder))


def test_a_pickle_beside_the_weights_is_left_alone(tmp_path, mark):
    folder = save_language_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        plant_torch(folder / name, mark)
    for name in ("vocab.pkl", "vocab.txt", "tokenizer.model"):
        plant(folder / name, mark)
    assert load_causal_lm(folder).num_parameters() > 0
    assert load_tokenizer(folder).eos_token_id is not None


def test_a_pickle_in_place_of_the_tokenizer(tmp_path, mark):
    folder = save_language_model(tmp_path / "model")
    plant(folder / "tokenizer.json", mark)
    with pytest.raises(UserError, match="no tokenizer could be loaded from there"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", PLANTS)
def test_a_pickle_in_place_of_a_gguf_file(tmp_path, mark, kind):
    file = PLANTS[kind](tmp_path / "model.gguf", mark)
    for load in (load_origin, load_origin_tokenizer):
        refused(lambda load=load: load(locate(str(file))), str(tmp_path))


@pytest.mark.parametrize("kind", PLANTS)
def test_a_pickled_adapter(tmp_path, mark, kind):
    change(tmp_path / "adapter_config.json", peft_type="LORA")
    PLANTS[kind](tmp_path / "adapter_model.bin", mark)
    refused(lambda: check_adapter(tmp_path), "is no LoRA adapter with its weights in adapter_model")


@pytest.mark.parametrize("change_of", [{"peft_type": "XLORA"}, {"megatron_config": {"a": 1}}])
def test_an_adapter_of_another_kind(tmp_path, change_of):
    (tmp_path / "adapter_model.safetensors").touch()
    change(tmp_path / "adapter_config.json", peft_type="LORA")
    check_adapter(tmp_path)
    change(tmp_path / "adapter_config.json", **change_of)
    refused(lambda: check_adapter(tmp_path), "is no LoRA adapter")


@pytest.mark.parametrize("suffix", ["pkl", "pt", "npy", "npz", "bin"])
def test_a_data_source_is_no_pickle(tmp_path, mark, suffix):
    file = plant(tmp_path / f"rows.{suffix}", mark)
    refused(lambda: OwnRows(path=str(file)).check("text"), "must end in .jsonl, ")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_pickle_by_another_name(tmp_path, mark, suffix):
    file = plant(tmp_path / f"rows.{suffix}", mark)
    refused(lambda: read_own(OwnRows(path=str(file)), "text"), str(file))


SCRIPT = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("rows.pkl", "No (supported) data files"),
        ("rows.pt", "No (supported) data files"),
        ("script", "Dataset scripts are no longer supported"),
        ("webdataset", "made of webdataset files"),
        ("yaml", "could not determine a constructor"),
    ],
)
def test_a_data_set_of_the_hub_or_a_folder(tmp_path, mark, monkeypatch, kind, words):
    import tarfile

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    if kind == "script":
        (folder / "rows.py").write_text(SCRIPT.format(str(mark)))
    elif kind == "webdataset":
        with tarfile.open(folder / "rows.tar", "w") as archive:
            archive.add(plant_torch(tmp_path / "0.pth", mark), "0.pth")
    elif kind == "yaml":
        call = f"!!python/object/apply:os.mkdir ['{mark}']"
        (folder / "README.md").write_text(f"---\nconfigs: {call}\n---\n")
    else:
        plant(folder / kind, mark)
    refused(lambda: read_own(OwnRows(hub=str(folder)), "text"), str(folder), words)


def test_state_of_ppo(tmp_path, mark):
    trainer = worlds.trainer()
    trainer.save(tmp_path)
    trainer.load(tmp_path, step=1)  # its own state is no more than tensors and plain values
    for planted in PLANTS.values():
        planted(tmp_path / "state.pt", mark)
        refused(
            lambda: trainer.load(tmp_path, step=1), str(tmp_path), "Delete", "run the same command"
        )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A pretrain stage that was stopped after a resume point."""
    from stages import data, pretrain, tokenizer
    from tests.stages.test_pretrain import interrupt_at

    run = tmp_path_factory.mktemp("run")
    words = ["--recipe=smoke", "--tracking=none", "--threads=1", f"--run={run}"]
    assert data.main(words) == 0
    assert tokenizer.main(words) == 0
    training = ["--training.steps=4", "--saving.every=2", "--training.log_every=2"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        assert pretrain.main([*words, *training]) == 130
    return run, [*words[:-1], *training]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"]
)
def test_a_resume_point_of_the_trainer(interrupted, tmp_path, mark, caplog, name):
    from stages import pretrain

    source, words = interrupted
    run = tmp_path / "run"
    shutil.copytree(source, run)
    point = run / "pretrain" / "checkpoints" / "step-2"
    if name == "pytorch_model.bin":
        (point / "model.safetensors").unlink()
    plant_torch(point / name, mark)
    record = read_json(point / "point.json")  # its maker can write any digest
    write_json(point / "point.json", sealed({**record, "files": files_of(point)}))
    assert pretrain.main([*words, f"--run={run}"]) == 2
    line = caplog.records[-1].getMessage()
    assert re.search(rf"pretrain: {re.escape(str(point))} holds .* Delete .* same command", line)
    assert not (run / "pretrain" / "manifest.json").exists()


def test_a_pickle_in_a_finished_folder_is_only_digested(tmp_path, mark):
    config = StageConfig(run=str(tmp_path), tracking="none")
    with begin(config, stage="sft", kind="causal-lm", parents={}) as run:
        plant_torch(run.path / "training_args.bin", mark)
        run.finish("done", chosen={}, summary={}, card="# Card")
    assert "training_args.bin" in open_artifact(run.path, kind="causal-lm").content["files"]


def test_no_code_of_ours_reads_a_pickle_freely():
    sources = [p for folder in ("pipeline", "stages") for p in Path(folder).rglob("*.py")]
    text = {str(path): path.read_text(encoding="utf-8") for path in sources}
    free = r"\b(?:pickle|dill|cloudpickle|joblib|marshal|shelve)\.loads?\(|\bnp\.load\(|read_pickle"
    assert not {path for path, source in text.items() if re.search(free, source)}
    loads = [
        call for source in text.values() for call in re.findall(r"torch\.load\([^)]*\)", source)
    ]
    assert loads
    assert all("weights_only=True" in call for call in loads)


def test_every_model_comes_in_by_one_door():
    """`from_pretrained` is called in pipeline.pretrained alone; peft's after `check_adapter`."""
    calls = {
        str(path): re.findall(r"(\w+)\.from_pretrained\(", path.read_text(encoding="utf-8"))
        for folder in ("pipeline", "stages")
        for path in Path(folder).rglob("*.py")
    }
    found = {path: set(names) for path, names in calls.items() if names}
    assert found.pop("pipeline/pretrained.py") == {"auto_class"}
    assert set().union(*found.values()) <= {"PeftModel", "PeftConfig"}
    assert json.dumps(sorted(found)) == '["pipeline/lora.py", "pipeline/ppo/sharing.py"]'
