"""Machines: sizes, accelerate's files, kinds of GPUs."""

from pathlib import Path

import pytest
import torch

from pipeline.doctor import machine
from pipeline.doctor.machine import Sharding, gpus, read_accelerate, size_of
from pipeline.errors import UserError

ACCELERATE = Path("configs/accelerate")


@pytest.mark.parametrize(
    ("words", "size"),
    [("80GB", 80 * 10**9), ("40 GiB", 40 * 2**30), ("1.5tb", 1.5e12), ("7000000", 7e6)],
)
def test_sizes_are_read(words, size):
    assert size_of(words) == size


@pytest.mark.parametrize("words", ["", "GB", "80 apples", "1.2.3GB", ".", "-1GB", "80"])
def test_what_is_no_size_is_refused(words):
    with pytest.raises(UserError, match="--device_memory: a size as in 80GB"):
        size_of(words)


def test_an_unknown_kind_of_gpu_is_refused():
    with pytest.raises(UserError, match="--device: must be one of a100, .*got 'b52'"):
        gpus("b52", processes=1, memory=0, sharding=Sharding())


def test_memory_that_is_named_replaces_the_kinds():
    found = gpus("h100", processes=8, memory=size_of("96GB"), sharding=Sharding())
    assert (found.room, found.is_gpu, found.is_here) == (96e9, True, False)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("cpu.yaml", (2, False, Sharding())),
        ("ddp.yaml", (2, True, Sharding())),
        ("multi_node.yaml", (16, True, Sharding())),
        ("fsdp2.yaml", (2, True, Sharding(kind="fsdp"))),
        ("deepspeed_zero2.yaml", (2, True, Sharding(kind="zero2"))),
        ("deepspeed_zero3.yaml", (2, True, Sharding(kind="zero3"))),
    ],
)
def test_accelerates_files_say_processes_devices_and_sharding(file, expected):
    assert read_accelerate(ACCELERATE / file) == expected


def test_offload_is_read(tmp_path):
    path = tmp_path / "zero.yaml"
    text = (ACCELERATE / "deepspeed_zero3.yaml").read_text()
    path.write_text(text.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu"))
    assert read_accelerate(path)[2] == Sharding(kind="zero3", offload_optimizer=True)
    path.write_text(
        (ACCELERATE / "fsdp2.yaml")
        .read_text()
        .replace("fsdp_offload_params: false", "fsdp_offload_params: true")
    )
    everything = Sharding(kind="fsdp", offload_weights=True, offload_optimizer=True)
    assert read_accelerate(path)[2] == everything


def test_a_file_that_accelerate_cannot_read_is_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    for text, words in (
        ("num_processes: [", "is not YAML in UTF-8 .*line 1"),
        ("", "must hold lines of `setting: value`"),
        ("- cpu", "must hold lines of `setting: value`"),
        ("distributed_type: MANY", ": accelerate cannot read it"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"bad.yaml ?{words}"):
            read_accelerate(path)


def test_processes_share_a_processors_memory_and_not_gpus(monkeypatch):
    monkeypatch.setattr(machine, "measured_rates", lambda threads: machine.GPUS["a100"].rates)
    one, two = (machine.this_machine(number) for number in (1, 2))
    assert one.is_here
    assert not one.is_gpu
    assert two.room == one.room / 2
    assert gpus("", processes=2, memory=0, sharding=Sharding()).room == 80e9


def test_a_stage_of_fewer_threads_computes_at_their_share(monkeypatch):
    rates = machine.Rates(fp32_flops=4e9, bf16_flops=8e9, bandwidth=2e9)
    monkeypatch.setattr(machine, "measured_rates", lambda threads: rates)
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    here = machine.this_machine(1)
    assert here.computing(0) == here.computing(4) == here.computing(9) == here
    one = here.computing(1)
    assert one.rates == machine.Rates(fp32_flops=1e9, bf16_flops=2e9, bandwidth=0.5e9)
    assert one.computing(1) == one
    assert machine.this_machine(2).computing(1).rates == rates.times(0.5)
    there = gpus("", processes=1, memory=0, sharding=Sharding())
    assert there.computing(1) == there


def test_measured_rates_are_those_of_real_products():
    rates = machine.measured_rates(1)
    assert 1e8 < rates.fp32_flops < 1e14
    assert 1e7 < rates.bandwidth < 1e13


def test_threads_are_as_fast_as_one_so_many_times(monkeypatch):
    monkeypatch.setattr(machine, "_fastest", lambda _: 1e-3)
    one, two = (machine.measured_rates(threads) for threads in (1, 2))
    products = 2 * 512**3 / 1e-3
    assert (one.fp32_flops, one.bf16_flops) == (products, products)
    assert one.bandwidth == 2 * 4 * machine.COPIED / 1e-3
    assert two == one.times(2.0)


def test_rates_are_of_one_thread_that_is_this_one(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "_fastest", lambda _: seen.append(torch.get_num_threads()) or 1.0)
    before = torch.get_num_threads()
    machine.measured_rates(before + 1)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == before
