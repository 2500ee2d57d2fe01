"""DeepSpeed's ZeRO 2 and 3 in two real processes on a processor, against whole models."""

import dataclasses
import importlib.util
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import stages.pretrain
from pipeline import distributed
from pipeline.callbacks import FiniteGradients
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.fitting import check_division
from pipeline.language_loss import LanguageModelTrainer
from pipeline.optim import given
from pipeline.restricted import restricted, saved_by_deepspeed
from pipeline.training import Training
from stages.sft import Config as SFTConfig
from tests.stages.test_ppo import make_models
from tests.support import SMOKE, assert_close, make_corpus, tiny_llama

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="the extra deepspeed is not installed")
WORDS = [
    *SMOKE, "--training.optimizer=adamw", "--training.learning_rate=1e-3", "--training.beta2=0.9",
    "--training.microbatch_size=2", "--training.minibatch_size=8", "--training.steps=6",
    "--training.eval_every=3", "--saving.every=2",
]  # fmt: skip
SECONDS = 300


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """A run folder with the smoke recipe up to a pretrained model, trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder)
    few = [
        *SMOKE,
        "--training.steps=2",
        "--training.warmup_steps=0",
        "--saving.every=0",
        f"--run={folder}",
    ]
    stages.pretrain.run(load(stages.pretrain.Config, few, stage="pretrain"))
    return folder


def start(
    zero: int, stage: str, run: Path, *more: str, words: Sequence[str] = WORDS
) -> subprocess.Popen[str]:
    """A stage of two processes that divide its model by a stage of ZeRO, or keep it whole for 0."""
    how = []
    if zero:
        wanted = Path(f"configs/accelerate/deepspeed_zero{zero}.yaml").read_text()
        file = run / f"zero{zero}.yaml"
        file.write_text(wanted.replace("use_cpu: false", "use_cpu: true"))
        how = [f"--config={file}"]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.launch", *how, "2", f"stages.{stage}", *words, *more,
         f"--run={run}"],
        env={k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=SECONDS)
    return process.returncode, said


def copied(parents: Path, folder: Path, stage: str) -> Path:
    folder.mkdir()
    for parent in parents.iterdir():
        if parent.is_dir() and parent.name != stage:
            shutil.copytree(parent, folder / parent.name)
    return folder


def assert_same(one: Path, other: Path) -> None:
    """The same weights and figures but for rounding; tied weights may be written twice."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert others.keys() <= weights.keys() | {"lm_head.weight"}
    for name, weight in weights.items():
        assert_close(others[name], weight, tolerance=1e-5)
    rows, others = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    )
    for row, other_row in zip(rows, others, strict=True):
        for name in row.keys() & other_row.keys():
            assert other_row[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name


@needs_deepspeed
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_divided_models_take_the_course_of_whole_ones(parents, tmp_path, stage):
    runs = [tmp_path / str(zero) for zero in (0, 2, 3)]
    if stage == "reward":
        whole = copied(parents, tmp_path / "sft", "sft")
        assert finished(start(0, "sft", whole))[0] == 0
        parents = whole
    for zero, run in zip((0, 2, 3), runs, strict=True):
        copied(parents, run, stage)
        code, said = finished(start(zero, stage, run))
        assert code == 0, said
        assert ("deepspeed" in said.lower()) == bool(zero)
    for run in runs[1:]:
        assert_same(runs[0] / stage, run / stage)


@needs_deepspeed
@pytest.mark.parametrize("zero", [2, 3])
def test_a_stage_that_is_stopped_goes_on_as_if_it_had_not_been(parents, tmp_path, zero):
    whole, run = (copied(parents, tmp_path / name, "sft") for name in ("whole", "divided"))
    long = "--training.steps=40"
    assert finished(start(0, "sft", whole, long))[0] == 0
    process = start(zero, "sft", run, long)
    began = time.monotonic()
    while not list((run / "sft").glob("checkpoints/step-*/point.json")):
        assert time.monotonic() - began < SECONDS
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finished(process)[0] == 75
    point = max((run / "sft" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert saved_by_deepspeed(point) == 2
    code, said = finished(start(0, "sft", run, long))
    assert code == 2
    assert "holds models divided by DeepSpeed over 2 processes, and now they are whole" in said
    code, said = finished(start(zero, "sft", run, long))
    assert (code, "goes on from step" in said) == (0, True), said
    assert_same(whole / "sft", run / "sft")


@needs_deepspeed
def test_ppo_divides_by_torch_what_zero_would(parents, tmp_path):
    whole = copied(parents, tmp_path / "whole", "sft")
    make_models(whole)
    words = (*SMOKE, "--updates=2", "--validate_every=1", "--validation_prompts=5")
    code, said = finished(start(0, "ppo", whole, words=words))
    assert code == 0, said
    for zero in (2, 3):
        run = copied(whole, tmp_path / str(zero), "ppo")
        code, said = finished(start(zero, "ppo", run, words=words))
        assert code == 0, said
        chosen = json.loads((run / "ppo" / "manifest.json").read_text())["content"]["chosen"]
        assert (chosen["sharding"], chosen["world_size"]) == ("fsdp2", 2)
        for name in ("", "value"):
            ours, theirs = (
                load_file(folder / "ppo" / name / "model.safetensors") for folder in (run, whole)
            )
            for key, weight in theirs.items():
                assert_close(ours[key], weight, tolerance=1e-5)


@needs_deepspeed
def test_states_of_deepspeed_are_read_without_running_code(tmp_path):
    folder = tmp_path / "global_step1"
    folder.mkdir()
    state = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    torch.save({"loss_scaler": LossScaler(1.0)}, state)
    with restricted(tmp_path):
        assert torch.load(state, weights_only=False)["loss_scaler"].cur_scale == 1.0
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"loss_scaler": Evil()}, state, pickle_module=pickle)
    with pytest.raises(UserError, match="holds more than tensors"), restricted(tmp_path):
        torch.load(state, weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_an_optimizer_that_is_thrown_away_is_taken_again(tmp_path):
    """As DeepSpeed's integration in Transformers does before it asks for another."""
    from transformers import TrainingArguments

    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = LanguageModelTrainer(
        language_model=model,
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
    )
    given(trainer, optimizer)
    trainer.optimizer = None
    assert trainer.create_optimizer() is optimizer


def test_muon_is_refused_where_matrices_are_laid_end_to_end(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    config = SFTConfig(training=Training(optimizer="muon"))
    with pytest.raises(UserError, match="muon needs whole matrices, and DeepSpeed lays them end"):
        distributed.setup(config, divides="accelerate")
    adamw = dataclasses.replace(config, training=Training(optimizer="adamw"))
    distributed._refuse_flattened(adamw)


@pytest.mark.parametrize(("saved", "made"), [(2, "divided by DeepSpeed over 2 p"), (0, "whole")])
def test_a_point_of_another_division_is_refused(tmp_path, saved, made):
    (tmp_path / "global_step4").mkdir()
    for rank in range(saved):
        (tmp_path / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    for now in ("whole", "divided by FSDP", "divided by DeepSpeed over 2 processes"):
        if now.startswith(made):
            check_division(tmp_path, now=now)
        else:
            with pytest.raises(UserError, match=f"holds models {made}.*, and now they are {now}. "):
                check_division(tmp_path, now=now)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_whose_figures_are_not_finite_ends_the_stage(name):
    """Gradients that are divided cannot be looked at before it."""
    state = SimpleNamespace(global_step=3)
    FiniteGradients().on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 2.0})
    with pytest.raises(UserError, match=f"{name} is not finite at step 3"):
        FiniteGradients().on_log(None, state, None, logs={name: math.nan})
