"""The command: its words, its answer, its exit codes, and every recipe on its hardware."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline.distributed import rank, world_size
from pipeline.doctor import machine
from pipeline.doctor.mending import mend
from pipeline.doctor.need import Need, Peak
from pipeline.doctor.needs import Planner
from pipeline.errors import UserError
from stages import doctor
from stages.doctor import Config, machine_of, main, parse, recipe_of, stage_configs

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe=none"], "no recipe configs/none; recipes here: cpu, "),
        (["--devices=-1"], "--devices: must be at least 0, got -1"),
        (["--accelerate_config=no.yaml"], "--accelerate_config: no file no.yaml"),
        (["--sft.max_length"], "--sft.max_length: no setting of a stage"),
        (["--nothing=1"], "--nothing=1: no setting of a stage"),
    ],
)
def test_wrong_words_are_one_line(words, message, caplog):
    with pytest.raises(UserError) as caught:
        parse(words)
    assert message in str(caught.value)
    assert main(words) == 2
    assert f"doctor: {message}" in caplog.text


def test_a_stages_wrong_setting_is_its_own_line(caplog):
    assert main(["--recipe=smoke", "--sft.max_length=1"]) == 2
    assert "max_length: must be at least 2, got 1" in caplog.text


def test_words_reach_their_stage_alone():
    configs = stage_configs(Config(recipe="smoke", words=("--sft.max_length=33",)))
    assert (configs["sft"].max_length, configs["reward"].max_length) == (33, 64)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"devices": 8}, (8, 80e9, True)),
        ({"devices": 2, "device": "rtx4090"}, (2, 24e9, True)),
        ({"device_memory": "40GB", "num_processes": 4}, (4, 40e9, True)),
        ({"accelerate_config": "configs/accelerate/ddp.yaml"}, (2, 80e9, True)),
    ],
)
def test_the_machine_is_the_one_that_is_named(words, expected):
    found = machine_of(Config(recipe="smoke", **words))
    assert (found.processes, found.room, found.is_gpu) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, (1, 24e9, True, "none")),
        ({"accelerate_config": "fsdp2.yaml"}, (2, 24e9, True, "fsdp")),
        ({"accelerate_config": "ddp.yaml", "num_processes": 8}, (8, 24e9, True, "none")),
        ({"accelerate_config": "cpu.yaml"}, (2, 32e9, False, "none")),
        ({"num_processes": 2}, (2, 32e9, False, "none")),  # as make starts them without a YAML
    ],
)
def test_a_machine_with_gpus_is_taken_as_it_is_and_its_processor_where_that_is_asked_for(
    words, expected, monkeypatch
):
    sizes = (48e9, 24e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu])
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64e9))
    monkeypatch.setattr(machine, "measured_rates", lambda threads: machine.GPUS["a100"].rates)
    if "accelerate_config" in words:
        words = words | {"accelerate_config": f"configs/accelerate/{words['accelerate_config']}"}
    found = machine_of(Config(recipe="smoke", **words))
    assert (found.processes, found.room, found.is_gpu, found.sharding.kind) == expected
    assert found.is_here
    other = machine_of(Config(recipe="smoke", device="a100", **words))
    assert (other.room, other.is_gpu, other.is_here) == (80e9, True, False)


def test_processes_that_deepspeed_connects_on_processors_divide_models_there(tmp_path):
    zero = Path("configs/accelerate/deepspeed_zero3.yaml").read_text()
    (tmp_path / "zero.yaml").write_text(zero.replace("use_cpu: false", "use_cpu: true"))
    found = machine_of(Config(recipe="smoke", accelerate_config=str(tmp_path / "zero.yaml")))
    assert (found.is_gpu, found.sharding.kind) == (False, "zero3")


def fixed(monkeypatch, total: float) -> None:
    def need(self, stage, configs):
        peak = Peak(moment="pass", weights=total)
        return Need(stage=stage, peak=peak, base=0.0, room=1e9, seconds=2.0, unit="step", units=30)

    monkeypatch.setattr(Planner, "need", need)


def test_what_a_pod_says_of_other_processes_is_not_of_this_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    monkeypatch.setattr(doctor, "run", lambda _: seen.append((rank(), world_size())) or 0)
    assert main(["--recipe=smoke"]) == 0
    assert seen == [(0, 1)]


def test_all_is_well(monkeypatch, capsys):
    fixed(monkeypatch, 0.5e9)
    assert main(["--recipe=smoke", "--devices=1"]) == 0
    told = capsys.readouterr().out
    assert "smoke on 1 process(es), GPUs of 80 GB, as fast as a100" in told
    assert "sft: 2 s a step, 30 of them 60 s" in told
    assert "ok  batch sizes divide over 1 process(es)" in told
    assert "NO  " not in told


def test_nothing_is_shown_of_what_is_only_rehearsed(capsys):
    main(["--recipe=smoke", "--devices=1"])
    found = capsys.readouterr()
    assert "pretrain" in found.out
    assert found.err == ""


def test_what_does_not_fit_is_told_with_exit_code_1(monkeypatch, capsys):
    fixed(monkeypatch, 2e9)
    assert main(["--recipe=smoke", "--devices=1"]) == 1
    told = capsys.readouterr().out
    least = "--sft.training.microbatch_size=1 --sft.lora.rank=16 --sft.lora.quantise=4bit"
    assert f"NO  sft does not fit; not even {least} helps (2.0 GB): divide the model" in told
    first = "--reward.normalisation.batch_size=16"
    least = f"{first} --reward.lora.rank=16 --reward.lora.quantise=4bit"
    assert f"NO  reward does not fit; not even {least} helps (2.0 GB): divide the model" in told


def test_a_change_that_a_stage_refuses_is_not_tried(monkeypatch, capsys):
    fixed(monkeypatch, 2e9)
    moving = "--ppo.kl.reference_rate=0.5"  # not with roles lora
    assert main(["--recipe=smoke", "--devices=1", moving]) == 1
    told = capsys.readouterr().out
    least = "not even --ppo.microbatch_size=1 helps (2.0 GB)"
    assert f"NO  ppo does not fit; {least}: take a smaller model" in told


COLUMNS = ("pretrain", "sft", "reward", "ppo", "evaluate")
WITHIN = 1.0
"""GB by which what is written of a recipe may differ: headers are rounded."""


def written(recipe: str, devices: str) -> Iterator[dict[str, float]]:
    """GB of each stage as a recipe's header has them, and the table of docs/doctor.md."""
    header = " ".join(Path(f"configs/{recipe}/data.yaml").read_text().replace("#", " ").split())
    words = r"pretrain (\d+) GB, " + ", ".join(rf"{stage} (\d+)" for stage in COLUMNS[1:])
    row = rf"^\| {re.escape(recipe)} \| {devices} " + 5 * r"\| ([\d.]+) "
    table = Path("docs/doctor.md").read_text()
    for found in (re.search(words, header), re.search(row, table, re.MULTILINE)):
        yield dict(zip(COLUMNS, map(float, found.groups()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "devices", "device"),
    [
        ("qwen2.5-0.5b-hh", 1, "rtx4090"),
        ("pythia-1b-tldr", 8, "a100"),
        ("llama-3.1-8b-ultrafeedback", 8, "a100"),
    ],
)
def test_a_recipe_fits_the_hardware_it_is_meant_for(capsys, monkeypatch, recipe, devices, device):
    monkeypatch.setattr("pipeline.doctor.recipe.config_folder", lambda init_from: None)
    code = doctor.main([f"--recipe={recipe}", f"--devices={devices}", f"--device={device}"])
    said = capsys.readouterr().out
    assert code == 0, said
    rows = [line.split() for line in said.splitlines() if line.startswith(COLUMNS)]
    found = {row[0]: float(row[6]) for row in rows if "yes" in row}
    for told in written(recipe, f"{devices} {device}"):
        assert told == pytest.approx(found, abs=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "devices", "lacking"),
    [
        ("qwen2.5-0.5b-hh", 8, {}),
        ("llama-3.1-8b-ultrafeedback", 8, {}),
        ("llama-3.1-70b", 32, {}),
        (
            "llama-3.1-70b",
            8,
            {"ppo": "it fits with --ppo.prompts_per_update=128 --ppo.minibatch_size=128: "},
        ),
    ],
)
def test_it_says_what_fits_on_so_many_gpus_of_80_gb_and_what_mends_the_rest(
    recipe, devices, lacking
):
    config = Config(recipe=recipe, devices=devices, device="a100")
    ours, gpus = recipe_of(config), machine_of(config)
    blueprint = ours.blueprint(packs=False)
    planner = Planner(blueprint=blueprint, machine=gpus, ranking=ours.ranking)
    stages = [stage for stage in doctor.MODELS if stage in ours.configs]
    needs = {stage: planner.need(stage, ours.configs) for stage in stages}
    assert {stage for stage, need in needs.items() if not need.fits} == set(lacking)
    for told in written(recipe, "32 a100") if devices == 32 else ():
        assert told == pytest.approx({s: n.total / 1e9 for s, n in needs.items()}, abs=WITHIN)
    for stage, words in lacking.items():
        told = mend(
            stage,
            ours.configs,
            machine=gpus,
            attempt=lambda more, stage=stage: planner.need(stage, stage_configs(config, *more)),
        )
        assert told.startswith(words)
