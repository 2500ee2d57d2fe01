"""What only a GPU can show; `make gpu-check` runs it, and no test elsewhere does.

A processor in float64 is the measure: a GPU must draw the same tokens and take the same steps.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import open_artifact
from pipeline.ppo import rollout
from pipeline.ppo.graphs import StaticSteps
from pipeline.ppo.passes import precision_context
from pipeline.ppo.rollout import generate, uniforms
from pipeline.storage import read_jsonl
from tests.ppo.worlds import EOS, PAD, PROMPTS, trainer, weights
from tests.support import assert_close, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BUDGET = 24
CHAIN = ("data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report")
DIVIDED = ("pretrain", "sft", "reward", "ppo")
ROOT = Path(__file__).parents[2]


def sampled(model, *, static=True):
    numbers = uniforms(1, update=0, rows=range(len(PROMPTS)), positions=BUDGET)
    on_gpu = model.device.type == "cuda"
    with mock.patch.object(rollout, "prefers_one_shape", return_value=static and on_gpu):
        return generate(model, PROMPTS, uniforms=numbers, eos_id=EOS, pad_id=PAD)


@pytest.fixture
def captured(monkeypatch):
    """Whether each attempt to capture a step made a graph."""
    made = []
    capture = StaticSteps._capture

    def noted(self):
        capture(self)
        made.append(self.graph is not None)

    monkeypatch.setattr(StaticSteps, "_capture", noted)
    return made


@pytest.mark.parametrize("static", [True, False], ids=["graphs", "growing"])
def test_tokens_are_those_of_a_processor(captured, static):
    model = tiny_llama().double()
    expected = sampled(model)
    found = sampled(model.to("cuda"), static=static)
    assert found.responses == expected.responses
    for ours, theirs in zip(found.figures["logprobs"], expected.figures["logprobs"], strict=True):
        assert_close(ours.cpu(), theirs, tolerance=1e-9)
    assert captured == ([True] * len(captured) if static else [])
    assert bool(captured) == static


def test_graphs_are_captured_anew_for_the_rows_that_are_left(captured, monkeypatch):
    monkeypatch.setattr(rollout, "RECAPTURE_AT", 0.9)
    model = tiny_llama().double()
    expected = sampled(model).responses
    assert sampled(model.to("cuda")).responses == expected
    assert len(captured) > 1
    assert all(captured)


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_graphs_in_bf16_say_what_growing_steps_say(captured, sharing):
    policy = trainer(device="cuda", sharing=sharing).roles.policy
    with precision_context("bf16", policy.device):
        graphs, growing = (sampled(policy, static=static) for static in (True, False))
    same = [a == b for a, b in zip(graphs.responses, growing.responses, strict=True)]
    assert sum(same) >= 0.8 * len(same)  # bf16 rounds otherwise where shapes differ
    for number in [number for number, is_same in enumerate(same) if is_same]:
        ours, theirs = (each.figures["logprobs"][number] for each in (graphs, growing))
        assert_close(ours.float(), theirs.float(), tolerance=0.1)
    assert captured
    assert all(captured)


@pytest.mark.parametrize("sharing", ["separate", "trunk", "lora"])
def test_updates_are_those_of_a_processor(sharing):
    there, here = (
        trainer(device=device, double=True, sharing=sharing) for device in ("cuda", "cpu")
    )
    for number in range(2):
        ours, theirs = there.update(number), here.update(number)
        assert ours.experience.responses == theirs.experience.responses
        for name, value in theirs.metrics.items():
            assert ours.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-8), name
    assert_close(weights(there).cpu(), weights(here), tolerance=1e-6)


@pytest.mark.parametrize("sharing", ["separate", "trunk", "lora"])
def test_an_update_in_bf16_ends_well(sharing):
    outcome = trainer(device="cuda", sharing=sharing, precision="bf16").update(0)
    assert all(map(math.isfinite, outcome.metrics.values()))
    assert outcome.metrics["policy/grad_norm"] > 0


def make(run: Path, *words: str, expected: int = 0) -> str:
    """Runs make on the smoke recipe; returns what it said."""
    command = ["make", "RECIPE=smoke", f"RUN={run}", f"PYTHON={sys.executable}", *words]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def with_config(name: str, *, processes: int) -> list[str]:
    return [f"ACCELERATE_CONFIG=configs/accelerate/{name}.yaml", f"NPROC={processes}"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The smoke recipe from data to report on one GPU."""
    run = tmp_path_factory.mktemp("gpu") / "run"
    make(run, *with_config("one_gpu", processes=1))
    return run


def test_the_whole_chain_runs_on_one_gpu(chain):
    for stage in CHAIN:
        assert (chain / stage / "manifest.json").is_file()
    for stage in DIVIDED:
        peaks = [row.get("system/peak_gpu_memory_gib", 0.0) for row in
                 read_jsonl(chain / stage / "timings.jsonl")]  # fmt: skip
        assert max(peaks) > 0, f"{stage} did not compute on the GPU"
    policy = open_artifact(chain / "ppo", kind="causal-lm")
    assert policy.summary["validation/kl"] > 0


def test_an_interrupted_ppo_ends_in_the_same_bytes(chain, tmp_path):
    exact = "ARGS=--deterministic=true --saving.every=1"
    ends = []
    for name, alarm in (("whole", ""), ("cut", " --saving.deadline=1")):
        run = shutil.copytree(
            chain, tmp_path / name, ignore=shutil.ignore_patterns("ppo", "report")
        )
        if alarm:  # a deadline that is past: it stops after its first step, and saves
            make(run, "ppo", exact + alarm, expected=2)
        make(run, "ppo", exact)
        ends.append(load_file(run / "ppo" / "model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@needs_two
@pytest.mark.parametrize(("name", "stages"), [("ddp", CHAIN), ("fsdp2", DIVIDED)])
def test_stages_run_on_two_gpus(chain, tmp_path, name, stages):
    run = tmp_path / "run"
    if name == "fsdp2":  # what it cannot divide is there already
        kept = shutil.ignore_patterns(*DIVIDED, "evaluate", "report")
        shutil.copytree(chain, run, ignore=kept)
    make(run, *stages, *with_config(name, processes=2))
    chosen = json.loads((run / "ppo" / "manifest.json").read_text())["content"]["chosen"]
    assert chosen["world_size"] == 2
    assert chosen["sharding"] == ("fsdp2" if name == "fsdp2" else "none")
