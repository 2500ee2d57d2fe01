"""Processes: threads, and the refusal to work alone when company was asked for."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import accelerate
import pytest

from pipeline import distributed
from pipeline.config import StageConfig
from pipeline.errors import UserError
from pipeline.models import choose_precision
from stages import data


def test_one_process_is_the_main_one():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]


def test_threads_are_as_configured_or_a_fair_share_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert distributed.num_threads(StageConfig(threads=3)) == 3
    assert distributed.num_threads(StageConfig()) == cores
    assert distributed.num_threads(StageConfig(num_processes=2 * cores)) == 1


@pytest.mark.parametrize("function", [distributed.setup, distributed.only_main])
def test_a_lonely_process_refuses_to_work_for_two(function):
    with pytest.raises(UserError, match="num_processes=2 asked for, but 1 connected.*NPROC=2"):
        function(StageConfig(num_processes=2))


def test_an_unexpected_companion_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="=1 asked for, but 2 connected.*Unset RANK and WORLD"):
        distributed.only_main(StageConfig())


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({"RANK": "1"}, "RANK 1 of WORLD_SIZE 1"),
        ({"WORLD_SIZE": "two"}, "RANK 0 of WORLD_SIZE two"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
    ],
)
def test_a_place_that_there_is_not_ends_a_stage_in_one_line(monkeypatch, caplog, said, place):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.command.GRACE_SECONDS", 0)
    assert data.main(["--recipe=smoke"]) == 2
    assert f"the environment says {place}. Unset RANK and WORLD_SIZE" in caplog.text


def test_other_processes_leave_the_work_to_the_main_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not distributed.only_main(StageConfig(num_processes=2))


def test_processes_wait_longer_for_the_main_one_than_torch_lets_them(monkeypatch):
    asked = []

    def connected(**options):
        asked.append(options)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerate, "Accelerator", connected)
    distributed.setup(StageConfig())
    (patience,) = asked[0]["kwargs_handlers"]
    assert patience.to_kwargs() == {"timeout": timedelta(hours=1)}


def test_precision_is_the_stages_own_whatever_a_launcher_says(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    common = {"output_dir": str(tmp_path), "use_cpu": True}
    asked = {name: {**common, "bf16": name == "bf16"} for name in ("no", "bf16")}
    assert TrainingArguments(**asked["no"]).mixed_precision == "bf16"  # against which it is
    distributed.setup(StageConfig())
    for name, words in asked.items():
        assert TrainingArguments(**words).mixed_precision == name


def test_weights_in_the_processors_memory_are_exchanged_by_gloo(monkeypatch):
    asked = []

    def connected(**options):
        asked.append(options)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerate, "Accelerator", connected)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    distributed.setup(StageConfig(), offloads=True)
    assert asked[0]["kwargs_handlers"][0].backend == "cuda:nccl,cpu:gloo"


def test_deterministic_asks_torch_for_algorithms_that_are():
    import torch

    try:
        distributed.setup(StageConfig(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_time_in_collectives_is_counted_when_they_fail_too():
    before = distributed.seconds_together()
    for error in (None, ValueError):
        with pytest.raises(ValueError) if error else nullcontext(), distributed.together():
            time.sleep(0.02)
            if error:
                raise error
    assert distributed.seconds_together() - before >= 0.04


@pytest.mark.parametrize(("said", "expected"), [("", True), ("false", True), ("1", False)])
def test_a_launch_for_processors_leaves_a_gpu_alone(monkeypatch, said, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    assert distributed.on_gpu() == expected
    assert choose_precision("auto") == ("bf16" if expected else "fp32")


def test_a_stage_that_keeps_whole_models_refuses_to_divide_them(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="keeps whole models on every process, it cannot divide"):
        distributed.setup(StageConfig())


def test_a_stage_that_divides_by_itself_has_accelerate_connect_processes_alone(monkeypatch):
    seen = []

    def connected(**_options):
        seen.append(distributed.to_be_divided())
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerate, "Accelerator", connected)
    for variable in distributed.SHARDING.values():
        monkeypatch.setenv(variable, "true")
        distributed.setup(StageConfig(), divides="stage")
        assert distributed.to_be_divided()
        monkeypatch.delenv(variable)
    assert seen == [False, False]


def test_sharding_is_as_wanted_or_as_accelerates_launcher_says(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [distributed.sharding_of(word) for word in ("auto", "fsdp2")] == ["none", "fsdp2"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert [distributed.sharding_of(word) for word in ("auto", "none")] == ["fsdp2", "none"]
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert distributed.sharding_of("auto") == "fsdp2_offload"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.sharding_of("auto") == "none"


@pytest.mark.parametrize(
    ("stage", "offloaded", "expected"),
    [
        ("1", "none", "none"),
        ("2", "none", "fsdp2"),
        ("3", "none", "fsdp2"),
        ("", "none", "fsdp2"),
        ("3", "cpu", "fsdp2_offload"),
    ],
)
def test_zero_is_fsdp2_where_a_stage_divides_by_itself(monkeypatch, stage, offloaded, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", offloaded)
    assert distributed.sharding_of("auto") == expected
    assert distributed.sharding_of("none") == "none"


LEAVING = """
import atexit
import torch
import torch.distributed as dist
from pipeline import distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
held = dist.group.WORLD  # as FSDP holds it: its threads outlive the group's destruction
atexit.register(print, "what was registered has run")
for _ in range(3000):
    dist.all_gather([torch.zeros(1)], torch.zeros(1), async_op=True)
distributed.leave(75)
"""
"""A process with much for gloo's threads to free; ended by Python's teardown, 15 of 20 aborted."""


def test_a_process_that_has_left_the_others_ends_as_it_says():
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LEAVING],
            env={**os.environ, "WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (75, "what was registered has run\n"), done.stderr
