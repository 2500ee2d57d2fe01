"""The change that makes a stage fit: the first that helps is told, and what else there is."""

import pytest

from pipeline.config import require
from pipeline.doctor.machine import Sharding, gpus
from pipeline.doctor.mending import mend
from pipeline.doctor.need import Need, Peak
from pipeline.lora import LoRA
from pipeline.training import Training
from stages.evaluate import Config as EvaluateConfig
from stages.ppo import Config as PPOConfig
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
            ("--ppo.microbatch_size=1 --ppo.roles=lora --ppo.lora.rank=16 "
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
