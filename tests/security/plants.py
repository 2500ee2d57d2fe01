"""What an attacker would plant: pickles and modules that leave a mark when they run."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

MODULE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import LlamaModel, PreTrainedTokenizerFast

Path({mark!r}).touch()

class Config(LlamaConfig):
    model_type = "planted"

class Model(LlamaForCausalLM):
    config_class = Config

class Body(LlamaModel):
    config_class = Config

class Scorer(LlamaForSequenceClassification):
    config_class = Config

class Words(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "modeling_planted.Config",
    "AutoModel": "modeling_planted.Body",
    "AutoModelForCausalLM": "modeling_planted.Model",
    "AutoModelForSequenceClassification": "modeling_planted.Scorer",
}


class Bomb:
    """Its pickle makes an empty folder, the mark, when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def plant(file: Path, mark: Path) -> Path:
    """Writes a bomb as pickle does it and returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    return file


def plant_torch(file: Path, mark: Path) -> Path:
    """Writes a bomb as torch.save does it, in a zip archive, and returns the file."""
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model.embed_tokens.weight": Bomb(mark)}, file)
    return file


def plant_code(folder: Path, mark: Path) -> Path:
    """Makes a model's folder bring Python code of its own, which leaves the mark; returns it."""
    (folder / "modeling_planted.py").write_text(MODULE.format(mark=str(mark)), encoding="utf-8")
    change(folder / "config.json", model_type="planted", auto_map=AUTO_MAP)
    words = {"AutoTokenizer": [None, "modeling_planted.Words"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Words", auto_map=words)
    return folder


def change(file: Path, **values: Any) -> None:
    """Sets values of a JSON file."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}), encoding="utf-8")
