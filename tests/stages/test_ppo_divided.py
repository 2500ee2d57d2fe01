"""The ppo stage on two and four real processes, with divided models and whole ones."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from pipeline.checkpoint import open_artifact
from pipeline.errors import UserError
from pipeline.ppo.keep import kept_rollouts
from pipeline.ppo.wanted import check_sharding
from pipeline.storage import read_jsonl
from stages import data, ppo, tokenizer
from tests.stages.test_ppo import make_models
from tests.support import assert_close

CURVES = 1e-3
"""Of perplexities of some 500, and so of one part in a million; measured: 1.8e-4."""
WEIGHTS = 1e-5
"""A thirtieth of an AdamW step."""

ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
}
"""What accelerate's YAML for ZeRO 2 says to a process; ppo divides its models as fsdp2 does."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("ppo")
    plain = ["--recipe=smoke", f"--run={run}", "--tracking=none"]
    assert data.main(plain) == 0
    assert tokenizer.main(plain) == 0
    make_models(run)
    return run


def words(run, *more):
    sizes = ["--updates=2", "--saving.every=1", "--validate_every=1", "--validation_prompts=5"]
    plain = ["--recipe=smoke", f"--run={run}", "--tracking=none", "--threads=1"]
    return [*plain, "--keep_rollout_every=1", *sizes, *more]


def curves(run):
    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows], torch.tensor([v for row in rows for v in row.values()])


@pytest.fixture(scope="module")
def alone(run_folder):
    """The run of one process."""
    assert ppo.main(words(run_folder)) == 0
    return run_folder


def together(processes, run, *more, environment):
    launch = [sys.executable, "-m", "pipeline.launch", str(processes), "stages.ppo"]
    subprocess.run(
        [*launch, *words(run, *more)],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", **environment},
        timeout=900,
        check=True,
    )


def without_the_second_update(run):
    (run / "ppo" / "manifest.json").unlink()
    shutil.rmtree(run / "ppo" / "checkpoints" / "step-8")  # four steps an update


def first_rollout(run):
    path = next(iter(kept_rollouts(run / "ppo").values()))
    return parquet.read_table(path, columns=["token_ids", "mask", "ended"]).to_pydict()


def same(run, other):
    assert first_rollout(run) == first_rollout(other)  # token for token
    assert curves(run)[0] == curves(other)[0]
    assert_close(curves(run)[1], curves(other)[1], tolerance=CURVES)
    for name in ("model.safetensors", "value/model.safetensors"):
        ours, theirs = (load_file(folder / "ppo" / name) for folder in (run, other))
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            assert_close(weight, theirs[key], tolerance=WEIGHTS)


def test_divided_models_make_the_run_of_whole_ones_and_either_goes_on(alone, tmp_path):
    run = shutil.copytree(alone, tmp_path / "run", ignore=shutil.ignore_patterns("ppo"))
    together(2, run, "--activation_checkpointing=true", environment=ZERO)
    chosen = open_artifact(run / "ppo", kind="causal-lm").content["chosen"]
    assert (chosen["sharding"], chosen["workers"], chosen["world_size"]) == ("fsdp2", 1, 2)
    same(run, alone)
    # One process with whole models goes on from the point of two that held a part each.
    without_the_second_update(run)
    assert ppo.main(words(run)) == 0
    same(run, alone)


def test_four_processes_make_the_run_of_one_and_two_go_on_from_it(alone, tmp_path):
    run = shutil.copytree(alone, tmp_path / "run", ignore=shutil.ignore_patterns("ppo"))
    together(4, run, environment={})
    chosen = open_artifact(run / "ppo", kind="causal-lm").content["chosen"]
    assert (chosen["sharding"], chosen["world_size"]) == ("none", 4)
    same(run, alone)
    first, second = read_jsonl(run / "ppo" / "timings.jsonl")
    assert all(row["time/collectives_seconds"] > 0 for row in (first, second))
    assert "time/saving_seconds" not in first
    assert second["time/saving_seconds"] > 0
    begun = shutil.copytree(alone, tmp_path / "begun")
    without_the_second_update(begun)
    together(2, begun, environment={})
    same(begun, alone)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--sharding=zero",
            "sharding: must be one of auto, none, fsdp2, fsdp2_offload, got 'zero'",
        ),
        ("--sharding=fsdp2", "sharding: fsdp2 divides models over processes, and there is one"),
    ],
)
def test_a_mistake_is_one_line(run_folder, caplog, word, message):
    assert ppo.main(words(run_folder, word)) == 2
    assert message in caplog.records[-1].getMessage()


@pytest.mark.parametrize("roles", ["lora", "trunk"])
def test_roles_that_share_weights_are_not_divided(roles):
    with pytest.raises(UserError, match=f"divides models of their own, not those of roles {roles}"):
        check_sharding("fsdp2", roles=roles, engine="native", num_processes=2, on_gpu=False)
    check_sharding("none", roles=roles, engine="native", num_processes=1, on_gpu=False)


def test_weights_are_offloaded_from_gpus_only():
    with pytest.raises(UserError, match="fsdp2_offload moves weights to a GPU for each layer, and"):
        check_sharding(
            "fsdp2_offload", roles="separate", engine="native", num_processes=2, on_gpu=False
        )
    check_sharding("fsdp2_offload", roles="separate", engine="native", num_processes=2, on_gpu=True)


def test_divided_layers_are_not_compiled():
    named = {"roles": "separate", "engine": "native", "num_processes": 2, "on_gpu": True}
    with pytest.raises(UserError, match="compile: takes whole layers, and sharding fsdp2 divides"):
        check_sharding("fsdp2", **named, compiles=True)
    check_sharding("none", **named, compiles=True)


def test_only_the_native_engine_samples_by_divided_weights():
    with pytest.raises(UserError, match="engine.name: vllm_server takes whole weights, and shard"):
        check_sharding(
            "fsdp2", roles="separate", engine="vllm_server", num_processes=2, on_gpu=True
        )
