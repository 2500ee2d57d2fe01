"""Adapters trained by connected processes: the curves and the end are those of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stages.data
import stages.pretrain
import stages.reward
import stages.sft
import stages.tokenizer
from pipeline.config import load
from tests.support import SMOKE, assert_close

FEW = ["--training.steps=4", "--training.log_every=1", "--saving.every=0"]
ADAPTER = ["--lora.rank=4", "--training.optimizer=adamw"]
"""Not Muon, which makes every singular value 1, those that are rounding included."""

TOLERANCE = 1e-6
"""A two-thousandth of an AdamW step. Measured: 0, for one process adds the same microbatches that
the others read, and what they are multiplied by is a power of two. Without the reduction of
gradients: 0.02."""

LATE = """
import importlib, os, sys, time
from transformers import trainer

def late(output_dir, **named):
    time.sleep(3 * int(os.environ["RANK"]))
    return os.listdir(output_dir) and look(output_dir, **named)

look, trainer.sort_checkpoints = trainer.sort_checkpoints, late
raise SystemExit(importlib.import_module("stages.sft").main(sys.argv[1:]))
"""
"""Trainer's last look into its working folder, three seconds later on the second process."""

CURVES = 1e-5
"""Measured: 5e-6 (python -m benchmarks.worlds, which has four processes too)."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run folder with the smoke recipe up to sft, trained for a few steps."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("data", "tokenizer", "pretrain", "sft"):
        module = getattr(stages, stage)
        few = FEW if stage in ("pretrain", "sft") else []
        module.run(load(module.Config, [*SMOKE, *few, f"--run={folder}"], stage=stage))
    return folder


def words(folder: Path, stage: str, *, processes: int) -> list[str]:
    """The command line of a stage with adapters."""
    share = "microbatch_size=2" if stage == "sft" else "minibatch_size=4"
    return [
        *SMOKE,
        *FEW,
        *ADAPTER,
        f"--training.{share}",
        f"--run={folder}",
        f"--num_processes={processes}",
    ]


def alone(folder: Path, stage: str) -> None:
    """Runs a stage in this process."""
    module = getattr(stages, stage)
    module.run(load(module.Config, words(folder, stage, processes=1), stage=stage))


def together(folder: Path, stage: str, *, processes: int = 2, module: str = "stages") -> None:
    """Runs a stage in several processes, as `make NPROC=2` does."""
    launch = [sys.executable, "-m", "pipeline.launch", str(processes), f"{module}.{stage}"]
    result = subprocess.run(
        [*launch, *words(folder, stage, processes=processes)],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "1",
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(folder)]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def curves(folder: Path) -> torch.Tensor:
    """Every figure of every row of a stage's metrics."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([value for row in rows for _, value in sorted(row.items())])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter and the merged model of a stage's folder, by name."""
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {**load_file(folder / "model.safetensors"), **adapter}


@pytest.mark.parametrize(("stage", "processes"), [("sft", 4), ("reward", 4)])
def test_processes_train_the_adapter_that_one_does(parents, tmp_path, stage, processes):
    found = []
    for count in (1, processes):
        folder = tmp_path / str(count)
        for name in {"data", "pretrain", "sft"} - {stage}:
            shutil.copytree(parents / name, folder / name)
        if count == 1:
            alone(folder, stage)
        else:
            together(folder, stage, processes=count)
        found.append((weights(folder / stage), curves(folder / stage)))
    (one, curves_of_one), (two, curves_of_two) = found
    assert_close(curves_of_two, curves_of_one, tolerance=CURVES)
    assert len(curves_of_one) > 12  # loss, gradient and learning rate of four steps, validation
    assert one.keys() == two.keys()
    assert all(weight.any() for name, weight in one.items() if "lora_B" in name)
    for name, weight in two.items():
        assert_close(weight, one[name], tolerance=TOLERANCE)


def test_two_processes_go_on_from_the_point_of_one(parents, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FEW", [*FEW, "--saving.every=2"])
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("data", "pretrain"):
        shutil.copytree(parents / name, one / name)
    alone(one, "sft")
    shutil.copytree(one, two)
    (two / "sft" / "manifest.json").unlink()
    shutil.rmtree(two / "sft" / "checkpoints" / "step-4")
    together(two, "sft")
    assert_close(curves(two / "sft"), curves(one / "sft"), tolerance=CURVES)
    for name, weight in weights(two / "sft").items():
        assert_close(weight, weights(one / "sft")[name], tolerance=TOLERANCE)


def test_nothing_goes_that_the_other_process_still_looks_into(parents, tmp_path):
    for name in ("data", "pretrain"):
        shutil.copytree(parents / name, tmp_path / name)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sft.py").write_text(LATE)
    together(tmp_path, "sft", module="late")
    assert not (tmp_path / "sft" / ".trainer").exists()
