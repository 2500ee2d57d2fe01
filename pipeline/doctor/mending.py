"""The change that makes a stage fit: settings are tried one after another, smallest first."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.doctor.dividing import shares_base
from pipeline.doctor.need import Need

FEWEST_SAMPLES = 128
"""Replies by which a reward model's scores can be normalised: the mean is known to a tenth of the
deviation."""
RANK = 16
"""Of the adapters that are tried."""


def changes(stage: str, configs: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yields words that make a stage's settings smaller, each time more than the time before."""
    config = configs[stage]
    if stage.startswith("reward") and config.normalisation.num_samples > FEWEST_SAMPLES:
        yield [f"--{stage}.normalisation.num_samples={FEWEST_SAMPLES}"]
    section = "" if stage in ("ppo", "evaluate") else "training."
    name = "batch_size" if stage == "evaluate" else f"{section}microbatch_size"
    holder = config.training if section else config
    size = getattr(holder, name.rpartition(".")[2]) // 2
    smallest: list[str] = []
    while size >= 1:
        smallest = [f"--{stage}.{name}={size}"]
        yield smallest
        size //= 2
    if stage == "ppo" and config.roles != "lora":
        ranks = [f"--{name}.lora.rank={RANK}" for name in ("ppo", "reward")]
        yield [*smallest, "--ppo.roles=lora", *ranks]
    elif hasattr(config, "lora") and not config.lora.rank:
        yield [*smallest, f"--{stage}.lora.rank={RANK}"]
    for word in _other_readings(stage, configs):
        yield [word]
        yield [*smallest, word]


def _other_readings(stage: str, configs: Mapping[str, Any]) -> Iterator[str]:
    """Yields by which word a stage that trains nothing reads models that take less."""
    config = configs[stage]
    if stage == "evaluate" and not config.on_one_base and shares_base(configs):
        yield "--evaluate.on_one_base=true"
    packable = stage == "pretrain" and config.take_as_is and not config.init_from.endswith(".gguf")
    if packable and config.quantise == "none":
        yield "--pretrain.quantise=4bit"


def mend(stage: str, configs: Mapping[str, Any], *, attempt: Callable[[list[str]], Need]) -> str:
    """Returns what to change so that a stage fits, or what else there is where nothing of it helps.

    Args:
        stage: that does not fit.
        configs: settings by stage.
        attempt: returns what the stage needs with some words more.
    """
    config, last = configs[stage], None
    for words in changes(stage, configs):
        last = attempt(words)
        if last.fits:
            return f"it fits with {' '.join(words)}: {last.total / 1e9:,.1f} GB"
    least = f"no smaller batch helps ({last.total / 1e9:,.1f} GB): " if last else ""
    if stage == "evaluate" or getattr(config, "take_as_is", False):
        return (
            f"{least}its models are read whole, so run it where memory is, on a processor: "
            f"CUDA_VISIBLE_DEVICES= make {stage} RECIPE={config.recipe}; or take a smaller model"
        )
    if stage == "ppo":
        return f"{least}take a smaller model, or devices with more memory"
    return (
        f"{least}divide the model over more GPUs (ACCELERATE_CONFIG="
        "configs/accelerate/fsdp2.yaml), "
        "or take a smaller one"
    )
