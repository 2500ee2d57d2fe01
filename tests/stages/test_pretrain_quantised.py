"""Pretraining that takes a model as it is and measures it in 4 bits."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from pipeline import checkpoint, models
from pipeline.config import load
from pipeline.errors import UserError
from stages import pretrain
from tests.support import SMOKE, copy_corpus, make_corpus, tiny_llama


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """The smoke recipe's data and tokenizer, and a model of one token less."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tiny_llama(vocabulary=len(tokenizer) - 1, hidden=64).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def config_of(parents, run, **more):
    copy_corpus(parents, run)
    config = load(pretrain.Config, [*SMOKE, f"--run={run}"], stage="pretrain")
    taken = {"init_from": str(parents / "base"), "take_as_is": True, "sequence_length": 32}
    return replace(config, **taken | {"context_length": 0} | more)


def test_a_model_measured_in_4_bits_is_saved_whole(parents, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    loaded = []

    def noted(*args, **named):
        model = load_origin(*args, **named)
        loaded.append((model.model.layers[0].self_attn.q_proj.weight.dtype, model.device.type))
        return model

    load_origin = models.load_origin
    monkeypatch.setattr(models, "load_origin", noted)
    found = {}
    for quantise in ("none", "4bit"):
        run = tmp_path / quantise
        pretrain.run(config_of(parents, run, quantise=quantise))
        found[quantise] = checkpoint.open_artifact(run / "pretrain", kind="causal-lm")
    assert loaded == [(torch.float32, "cpu"), (torch.uint8, "cpu"), (torch.float32, "cpu")]
    whole, packed = found["none"], found["4bit"]
    # The row of the token that was added is drawn; it is the same in both.
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (whole.path / name).read_bytes() == (packed.path / name).read_bytes()
    assert packed.summary["parameters"] == whole.summary["parameters"]
    assert packed.summary["measured_in_bits"] == 4
    assert "measured_in_bits" not in whole.summary
    assert packed.summary["loss"] != whole.summary["loss"]
    assert packed.summary["loss"] == pytest.approx(whole.summary["loss"], rel=0.05)
    words = "Figures are those of the model in 4 bits; what is here is in full precision."
    assert words in (packed.path / "README.md").read_text()
    assert "4 bits" not in (whole.path / "README.md").read_text()
    assert "quantization_config" not in json.loads((packed.path / "config.json").read_text())


def test_4_bits_without_their_library_are_refused(parents, tmp_path, monkeypatch):
    config = config_of(parents, tmp_path, quantise="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="quantise: 4bit needs bitsandbytes, which is missing; set"):
        pretrain.run(config)
    assert not (tmp_path / "pretrain").exists()


def test_the_headline_says_that_the_figures_are_of_4_bits():
    summary = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5, "steps": 0, "parameters": 9}
    assert "bits per byte in 4 bits, 9 parameters" in pretrain.headline(
        summary | {"measured_in_bits": 4}
    )
    assert "4 bits" not in pretrain.headline(summary)
