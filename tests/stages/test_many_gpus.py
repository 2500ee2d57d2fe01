"""A process that sees several GPUs trains on one: Trainer would give each a copy of the model."""

from functools import cached_property

import pytest
import transformers

import pipeline.fitting
import pipeline.reward.making
import stages.data
import stages.pretrain
import stages.reward
import stages.sft
import stages.tokenizer
from pipeline.config import load
from tests.support import SMOKE

FEW = ["--training.steps=1", "--training.warmup_steps=0", "--saving.every=0"]
TRAINS = ("pretrain", "sft", "reward")


class Seen(Exception):
    """The trainer is made."""


def run(stage, folder):
    module, few = getattr(stages, stage), FEW if stage in TRAINS else []
    module.run(load(module.Config, [*SMOKE, *few, f"--run={folder}"], stage=stage))


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for stage in ("data", "tokenizer", "pretrain", "sft"):
        run(stage, folder)
    return folder


@pytest.fixture
def eight_gpus(monkeypatch):
    """What Trainer counts of them; there is none to compute on."""
    arguments = transformers.TrainingArguments
    counted = arguments.__dict__["_setup_devices"].func

    def devices(self):
        device = counted(self)
        self._n_gpu = 8
        return device

    seen = cached_property(devices)
    seen.__set_name__(arguments, "_setup_devices")
    monkeypatch.setattr(arguments, "_setup_devices", seen)


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("stage", TRAINS)
def test_a_process_trains_on_one_gpu_of_many(parents, tmp_path, monkeypatch, stage):
    made = []

    def fit(trainer, *_, **__):
        made.append(trainer)
        raise Seen

    for module in (pipeline.fitting, pipeline.reward.making):
        monkeypatch.setattr(module, "fit", fit)
    for name in ("data", "tokenizer", "pretrain", "sft"):
        if name != stage:
            (tmp_path / name).symlink_to(parents / name)
    with pytest.raises(Seen):
        run(stage, tmp_path)
    arguments = made[0].args
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    assert made[0]._wrap_model(made[0].model) is made[0].model
