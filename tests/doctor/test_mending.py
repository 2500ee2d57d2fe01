"""The change that makes a stage fit: what is tried in which order, what is told, what else."""

import dataclasses

import pytest

from pipeline.config import require
from pipeline.doctor.machine import Sharding, gpus
from pipeline.doctor.mending import changes, mend
from pipeline.doctor.need import Need, Peak
from pipeline.lora import LoRA
from pipeline.training import Training
from stages.evaluate import Config as EvaluateConfig
from stages.ppo import Config as PPOConfig
from stages.pretrain import Config as PretrainConfig
from stages.reward import Config as RewardConfig
from stages.sft import Config as SFTConfig

pytestmark = pytest.mark.usefixtures("unchecked")

MACHINE = gpus("a100", processes=1, memory=0, sharding=Sharding())


def need(total: float) -> Need:
    found = Peak(moment="pass", weights=total)
    return Need(stage="sft", peak=found, base=0.0, room=5e9, seconds=1.0, unit="step")


def test_the_first_change_that_fits_is_told():
    asked = []

    def attempt(words):
        asked.append(words)
        return need(8e9 / len(asked))

    configs = {"sft": SFTConfig(training=Training(microbatch_size=8))}
    told = mend("sft", configs, machine=MACHINE, attempt=attempt)
    assert told == "it fits with --sft.training.microbatch_size=2: 4.0 GB"


def test_what_is_refused_is_passed_over():
    def attempt(words):
        require("--sft.training.microbatch_size=1" not in words[:1], "refused")
        return need(9e9)

    configs = {"sft": SFTConfig(training=Training(microbatch_size=4))}
    told = mend("sft", configs, machine=MACHINE, attempt=attempt)
    assert told.startswith("not even --sft.training.microbatch_size=2 helps (9.0 GB): ")


LESS = "take a smaller model, or devices with more memory"
BATCH = "--sft.training.microbatch_size=1"


@pytest.mark.parametrize(
    ("stage", "config", "least", "words"),
    [
        (
            "sft", SFTConfig(), f"{BATCH} --sft.lora.rank=16 --sft.lora.quantise=4bit",
            "divide the model over more GPUs (ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml)",
        ),
        ("sft", SFTConfig(lora=LoRA(rank=4)), f"{BATCH} --sft.lora.quantise=4bit", LESS),
        ("sft", SFTConfig(lora=LoRA(rank=4, quantise="4bit")), BATCH, LESS),
        (
            "ppo", PPOConfig(),
            ("--ppo.microbatch_size=1 --ppo.prompts_per_update=16 --ppo.minibatch_size=16 "
             "--ppo.validation_prompts=16 --ppo.roles=lora --ppo.lora.rank=16 "
             "--reward.lora.rank=16 --ppo.lora.quantise=4bit"), LESS,
        ),
        (
            "reward", RewardConfig(lora=LoRA(rank=4, quantise="4bit")),
            "--reward.normalisation.batch_size=16 --reward.training.microbatch_size=1", LESS,
        ),
        (
            "evaluate", EvaluateConfig(recipe="smoke"), "--evaluate.batch_size=1",
            "on a processor: CUDA_VISIBLE_DEVICES= make evaluate RECIPE=smoke;",
        ),
    ],
)  # fmt: skip
def test_where_nothing_helps_something_else_is_told(stage, config, least, words):
    configs = {"ppo": PPOConfig(), "reward": RewardConfig(), stage: config}
    told = mend(stage, configs, machine=MACHINE, attempt=lambda _: need(9e9))
    assert told.startswith(f"not even {least} helps (9.0 GB): ")
    assert words in told
    assert ("divide" in told) == ("divide" in words)


def test_fewer_replies_together_are_tried_before_smaller_batches():
    asked = []
    configs = {"reward": RewardConfig(training=Training(microbatch_size=2))}
    mend("reward", configs, machine=MACHINE, attempt=lambda words: asked.append(words) or need(9e9))
    fewer = "--reward.normalisation.batch_size=16"
    assert asked[:2] == [[fewer], [fewer, "--reward.training.microbatch_size=1"]]


def tried(stage: str, configs, processes=1, **sharding) -> list[list[str]]:
    machine = gpus("a100", processes=processes, memory=0, sharding=Sharding(**sharding))
    return list(changes(stage, configs, machine=machine))


def test_smaller_batches_are_tried_before_adapters_and_those_before_4_bits():
    training = Training(minibatch_size=8, microbatch_size=4)
    assert tried("sft", {"sft": SFTConfig(training=training)}) == [
        ["--sft.training.microbatch_size=2"],
        ["--sft.training.microbatch_size=1"],
        ["--sft.training.microbatch_size=1", "--sft.lora.rank=16"],
        ["--sft.training.microbatch_size=1", "--sft.lora.rank=16", "--sft.lora.quantise=4bit"],
    ]
    fewer = [
        f"--ppo.{n}=16" for n in ("prompts_per_update", "minibatch_size", "validation_prompts")
    ]
    adapters = ["--ppo.roles=lora", "--ppo.lora.rank=16", "--reward.lora.rank=16"]
    packed = [*adapters, "--ppo.lora.quantise=4bit"]
    assert tried("ppo", {"ppo": PPOConfig(microbatch_size=2)})[-4:] == [
        ["--ppo.microbatch_size=1", *before, *words]
        for before in ([], fewer)
        for words in (adapters, packed)
    ]


@pytest.mark.parametrize("kind", ["none", "fsdp"])
def test_adapters_that_are_trained_already_are_tried_in_4_bits(kind):
    training = Training(minibatch_size=8, microbatch_size=1)
    adapted = SFTConfig(lora=LoRA(rank=4), training=training)
    assert tried("sft", {"sft": adapted}, kind=kind) == [["--sft.lora.quantise=4bit"]]
    packed = dataclasses.replace(adapted, lora=LoRA(rank=4, quantise="4bit"))
    assert tried("sft", {"sft": packed}, kind=kind) == []


def test_adapters_are_not_tried_where_models_are_divided():
    config = SFTConfig(training=Training(minibatch_size=8, microbatch_size=1))
    assert tried("sft", {"sft": config}, 2, kind="fsdp") == []
    few = PPOConfig(prompts_per_update=32, microbatch_size=1)
    assert tried("ppo", {"ppo": few}, 2, kind="fsdp") == []


def test_fewer_replies_are_tried_with_what_goes_with_them():
    config = PPOConfig(prompts_per_update=128, minibatch_size=64, validation_prompts=64)
    small = "--ppo.microbatch_size=1"
    fewer = [
        ["--ppo.prompts_per_update=64"],
        [f"--ppo.{name}=32" for name in ("prompts_per_update", "minibatch_size",
                                         "validation_prompts")],
    ]  # fmt: skip
    found = tried("ppo", {"ppo": config}, 2)
    assert found[found.index([small]) + 1 :][:3] == [*fewer, [small, *fewer[-1]]]
    assert tried("ppo", {"ppo": config}, 8)[-3][0] == small  # 8 replies of a process are few


@pytest.mark.parametrize(
    ("minibatch", "processes", "sizes"),
    [(60, 1, [6, 3, 1]), (60, 2, [6, 3, 1]), (60, 4, [5, 1]), (30, 4, [])],
)
def test_only_microbatches_that_divide_the_minibatch_are_tried(minibatch, processes, sizes):
    training = Training(minibatch_size=minibatch, microbatch_size=15)
    words = [f"--pretrain.training.microbatch_size={size}" for size in sizes]
    configs = {"pretrain": PretrainConfig(training=training)}
    assert tried("pretrain", configs, processes) == [[word] for word in words]


ADAPTED = {
    "ppo": PPOConfig(roles="lora", lora=LoRA(rank=4)),
    "reward": RewardConfig(lora=LoRA(rank=4)),
}
TAKEN = PretrainConfig(
    init_from="a/b", take_as_is=True, training=Training(minibatch_size=2, microbatch_size=2)
)


def test_models_are_read_on_one_base_or_in_4_bits_where_smaller_batches_do_not_help():
    evaluate = EvaluateConfig(batch_size=2)
    smaller, word = "--evaluate.batch_size=1", "--evaluate.on_one_base=true"
    found = tried("evaluate", {**ADAPTED, "evaluate": evaluate})
    assert found == [[smaller], [word], [smaller, word]]
    shared = dataclasses.replace(evaluate, on_one_base=True)
    assert tried("evaluate", {**ADAPTED, "evaluate": shared}) == [[smaller]]
    apart = ADAPTED | {"reward": RewardConfig(), "evaluate": evaluate}
    assert tried("evaluate", apart) == [[smaller]]


def test_a_model_that_is_taken_as_it_is_may_be_measured_in_4_bits_unless_it_is_a_gguf_file():
    smaller, word = "--pretrain.training.microbatch_size=1", "--pretrain.quantise=4bit"
    assert tried("pretrain", {"pretrain": TAKEN}, 4) == [[smaller], [word], [smaller, word]]
    for more in ({"quantise": "4bit"}, {"init_from": "a.gguf"}):
        other = dataclasses.replace(TAKEN, **more)
        assert tried("pretrain", {"pretrain": other}) == [[smaller]]
