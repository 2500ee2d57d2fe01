"""The command: its words, its answer, its exit codes, and every recipe on its hardware."""

import pytest

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


def fixed(monkeypatch, total: float) -> None:
    def need(self, stage, configs):
        peak = Peak(moment="pass", weights=total)
        return Need(stage=stage, peak=peak, base=0.0, room=1e9, seconds=2.0, unit="step", units=30)

    monkeypatch.setattr(Planner, "need", need)


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
    assert code == 0, capsys.readouterr().out


@pytest.mark.slow
def test_every_stage_of_the_70b_recipe_fits_on_80_gb():
    config = Config(recipe="llama-3.1-70b", devices=32, device="a100")
    recipe, machine = recipe_of(config), machine_of(config)
    blueprint = recipe.blueprint(packs=False)
    planner = Planner(blueprint=blueprint, machine=machine, ranking=recipe.ranking)
    assert [s for s in doctor.MODELS if s in recipe.configs] == [
        s for s in doctor.MODELS if s in recipe.configs and planner.need(s, recipe.configs).fits
    ]
