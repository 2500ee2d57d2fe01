"""Folders of models: a header that lies, a tensor too few, a configuration of anything."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import (
    load_causal_lm,
    load_reward_model,
    score_responses,
)
from pipeline.ppo.rollout import generate, uniforms
from tests.fuzz.support import as_json, damaged, damaged_bytes, fuzz, one_line
from tests.support import tiny_llama, tiny_reward_model

WEIGHTS = "model.safetensors"
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two whole models, and a folder in which one of them is damaged."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(root / "lm")
    tiny_reward_model().save_pretrained(root / "reward")
    return root


LOADERS = {"lm": load_causal_lm, "reward": load_reward_model}


def reload(folders, kind: str, name: str, content: bytes):
    """Loads a copy of a model in which one file holds something else; None where it is refused."""
    folder = folders / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / kind, folder)
    (folder / name).write_bytes(content)
    return one_line(lambda: LOADERS[kind](folder))


def assert_same(model, whole) -> None:
    """Never a random weight, or one read from the wrong place."""
    theirs = model.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(theirs[name], tensor), name


def opened(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def closed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize("kind", LOADERS)
@fuzz(10, share=0.4)
@given(data=st.data())
def test_a_damaged_header_gives_the_same_weights_or_one_line(folders, kind, data):
    whole = (folders / kind / WEIGHTS).read_bytes()
    header, rest = opened(whole)
    how = data.draw(st.sampled_from(("values", "dtype", "length", "bytes", "cut")))
    if how == "values":
        content = closed(as_json(data.draw(damaged(header))), rest)
    elif how == "dtype":
        name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        header[name]["dtype"] = data.draw(st.sampled_from(DTYPES))
        content = closed(as_json(header), rest)
    elif how == "length":
        length = data.draw(st.sampled_from((0, 1, 2**31, 2**63, 2**64 - 1)) | st.integers(0, 9999))
        content = closed(as_json(header), rest, length)
    else:
        size = len(whole) - len(rest)
        content = data.draw(damaged_bytes(whole[:size])) + (rest if how == "bytes" else b"")
    model = reload(folders, kind, WEIGHTS, content)
    if model is not None:
        assert_same(model, LOADERS[kind](folders / kind))


@pytest.mark.parametrize("kind", LOADERS)
@fuzz(10, share=0.4)
@given(data=st.data())
def test_a_damaged_configuration_gives_a_model_that_answers_or_one_line(folders, kind, data):
    config = json.loads((folders / kind / "config.json").read_text())
    model = reload(folders, kind, "config.json", as_json(data.draw(damaged(config))))
    if model is not None and kind == "lm":
        prompts, numbers = [[3, 4, 5], [6]], uniforms(1, update=0, rows=[0, 1], positions=3)
        generate(model, prompts, uniforms=numbers, eos_id=1, pad_id=0)
    elif model is not None:
        score_responses(model, [[3, 4, 5], [6]], [[7], [8, 1]], pad_id=0)


@pytest.mark.parametrize("size", ["num_hidden_layers", "vocab_size", "intermediate_size"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_far_larger_model_than_its_files_is_refused_before_it_is_made(folders, kind, size):
    config = json.loads((folders / kind / "config.json").read_text())
    config[size] = 2**31
    assert reload(folders, kind, "config.json", json.dumps(config).encode()) is None


@pytest.mark.parametrize("how", ["extra", "missing", "shape", "renamed"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_tensor_too_many_too_few_or_of_another_shape(folders, kind, how):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders / kind / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "extra":
        tensors["stranger"] = torch.ones(2)
    elif how == "shape":
        tensors[name] = torch.ones(3, 3)
    else:
        tensor = tensors.pop(name)
        if how == "renamed":
            tensors["model.layers.7.mlp.up_proj.weight"] = tensor
    save_file(tensors, folders / "other.safetensors", metadata={"format": "pt"})
    model = reload(folders, kind, WEIGHTS, (folders / "other.safetensors").read_bytes())
    assert (model is None) == (how != "extra")
