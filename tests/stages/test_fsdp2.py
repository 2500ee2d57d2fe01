"""Models that Accelerate divides over two processes are trained as whole ones are."""

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
from pipeline.errors import UserError
from pipeline.stopping import STOPPED
from tests.support import SMOKE, assert_close

FEW = ["--training.steps=4", "--training.log_every=1", "--training.optimizer=adamw"]
FEW += ["--training.eval_every=2", "--saving.every=2"]
CURVES, WEIGHTS = 1e-5, 1e-5
"""Gradients are added in another order. Without what sums them up the curves are off by 1e-2."""
PARENTS = {"pretrain": (), "sft": ("pretrain",), "reward": ("sft",)}


def words(folder: Path, *more: str) -> list[str]:
    return [*SMOKE, *FEW, f"--run={folder}", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with the smoke recipe up to reward, by one process."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("data", "tokenizer", *PARENTS):
        module = getattr(stages, name)
        told = words(folder) if name in PARENTS else [*SMOKE, f"--run={folder}"]
        module.run(load(module.Config, told, stage=name))
    return folder


def divided(folder: Path, stage: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs a stage in two processes, each with its part of the model."""
    launch = [sys.executable, "-m", "pipeline.launch", "2", "tests.fsdp_on_processors"]
    return subprocess.run(
        [*launch, f"stages.{stage}", *words(folder, "--num_processes=2", *more)],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def begun(whole: Path, folder: Path, stage: str) -> Path:
    """A run folder in which everything before a stage is done."""
    for name in ("data", "tokenizer", *PARENTS[stage]):
        shutil.copytree(whole / name, folder / name)
    return folder


def curves(folder: Path) -> torch.Tensor:
    """Every figure of every row of a stage's metrics."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([value for row in rows for _, value in sorted(row.items())])


@pytest.mark.parametrize("stage", PARENTS)
def test_divided_models_take_the_course_of_whole_ones(whole, tmp_path, stage):
    folder = begun(whole, tmp_path / "run", stage)
    done = divided(folder, stage)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(curves(folder / stage), curves(whole / stage), tolerance=CURVES)
    found, expected = (load_file(run / stage / "model.safetensors") for run in (folder, whole))
    for name, weight in expected.items():  # a head that is the embedding is written too
        assert_close(found[name], weight, tolerance=WEIGHTS)


def test_a_resume_point_of_divided_models_is_gone_on_from(whole, tmp_path):
    folder = begun(whole, tmp_path / "run", "sft")
    asked = divided(folder, "sft", "--saving.deadline=1")  # is past: it stops after its first step
    assert asked.returncode == STOPPED, asked.stderr[-3000:]
    points = [point.name for point in (folder / "sft" / "checkpoints").iterdir()]
    assert points == ["step-1"]
    with pytest.raises(UserError, match="divided by FSDP, and now they are whole. Go on"):
        stages.sft.run(load(stages.sft.Config, words(folder), stage="sft"))
    done = divided(folder, "sft")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(curves(folder / "sft"), curves(whole / "sft"), tolerance=CURVES)
