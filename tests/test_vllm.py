"""Real vLLM, its build for processors: what it samples is the policy, after every update.

Skipped where vLLM is not installed; `make vllm-check` builds an environment that has it.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stages.ppo
import stages.pretrain
import stages.reward
import stages.sft
from pipeline.config import load
from pipeline.errors import UserError
from tests.support import SMOKE, make_corpus
from tests.vllm_on_processors import PROCESSORS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
"""Its attention on a processor wants heads of at least 32."""
FEW = ["--training.steps=2", "--training.warmup_steps=0", "--saving.every=0"]
LONGEST, SECONDS = 64, 240
ROUNDING = 1e-5
"""Nats between two float32 passes; measured: 1e-6. Weights one update old are 0.05 away."""


def chain(folder: Path, *, tied: bool) -> Path:
    """A run folder up to a reward model, each trained for two steps."""
    make_corpus(folder)
    options = json.dumps(SHAPE | {"intermediate_size": 64, "tie_word_embeddings": tied})
    words = {"pretrain": [*FEW, f"--architecture.options={options}"], "sft": FEW, "reward": FEW}
    for name, more in words.items():
        stage = getattr(stages, name)
        stage.run(load(stage.Config, [*SMOKE, *more, f"--run={folder}"], stage=name))
    return folder


def start(model: Path, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server of a model, once it answers, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}",
         "--host=127.0.0.1", f"--port={port}", "--dtype=float32", "--enforce-eager",
         f"--max-model-len={LONGEST}", *words],
        env=os.environ | PROCESSORS | {"VLLM_SERVER_DEV_MODE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    url, ends = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    while time.monotonic() < ends:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            assert process.poll() is None, "the server has ended"
            time.sleep(0.5)
        else:
            return process, url
    stop(process)
    raise AssertionError("the server does not answer")


def stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return chain(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return chain(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def server(untied) -> Iterator[str]:
    process, url = start(untied / "sft", "--logprobs-mode=processed_logprobs")
    yield url
    stop(process)


def ppo(run: Path, url: str, *words: str) -> list[dict[str, Any]]:
    """The metrics of the updates of a stage that samples by a server."""
    words = (
        *SMOKE, f"--run={run}", "--force=true", "--engine.name=vllm_server",
        f"--engine.server_url={url}", f"--engine.weights_dir={run / 'weights'}", *words,
    )  # fmt: skip
    stages.ppo.run(load(stages.ppo.Config, list(words), stage="ppo"))
    return engine_metrics(run)


def engine_metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "ppo" / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "engine/kl" in (row := json.loads(line))]


def test_a_server_samples_what_the_policy_is_after_every_update(untied, server):
    rows = ppo(untied, server, "--temperature=0.8", "--optimisation.learning_rate=3e-3")
    assert len(rows) == 4
    assert max(row["engine/gap_max"] for row in rows) < ROUNDING
    assert max(row["objective/kl"] for row in rows) > 0.05  # the policy has moved
    assert all(row["engine/capped_frac"] == 0 for row in rows)


def test_a_server_of_another_precision_is_measured_and_corrected(untied, server):
    (row, *_) = ppo(untied, server, "--precision=bf16")
    assert ROUNDING < row["engine/gap_max"] < 0.5


def test_a_server_that_reads_too_little_is_refused(untied, server):
    with pytest.raises(UserError, match="reads 64 tokens, .* may have 92; start it with --max-mo"):
        ppo(untied, server, "--max_response_tokens=60")


def test_a_server_that_is_gone_is_one_line(untied):
    process, url = start(untied / "sft", "--logprobs-mode=processed_logprobs")
    stop(process)
    with pytest.raises(UserError, match="engine.server_url: http://127.0.0.1:.* does not answer"):
        ppo(untied, url)


def test_log_probabilities_before_the_temperature_are_refused(tied):
    process, url = start(tied / "sft")
    try:
        with pytest.raises(UserError, match="are raw_logprobs; start it with --logprobs-mode pro"):
            ppo(tied, url)
    finally:
        stop(process)


def test_output_weights_that_would_stay_behind_are_refused(tied):
    process, url = start(tied / "sft", "--logprobs-mode=processed_logprobs")
    try:
        with pytest.raises(UserError, match="does not take new output weights that are tied"):
            ppo(tied, url)
    finally:
        stop(process)


@pytest.mark.parametrize("processes", [1, 2])
def test_vllm_in_the_processes_that_train(tied, processes):
    """It samples in bfloat16 where the model is float32, whatever the stage computes in."""
    launch = ["-m", "pipeline.launch", "2"] if processes == 2 else ["-m"]
    ended = subprocess.run(
        [sys.executable, *launch, "tests.vllm_on_processors", *SMOKE, f"--run={tied}",
         "--force=true", "--engine.name=vllm_colocate", "--optimisation.learning_rate=3e-3"],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = engine_metrics(tied)
    assert len(rows) == 4
    assert max(row["objective/kl"] for row in rows) > 0.05
    assert max(row["engine/gap_mean"] for row in rows) < 0.02  # no update is left out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt_neox", "gemma2", "gpt2"])
def test_weights_of_an_architecture_arrive_by_both_ways(kind):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.vllm_weights", kind],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    gaps = json.loads(ended.stdout.splitlines()[-1])
    assert max(gaps.values()) < ROUNDING
