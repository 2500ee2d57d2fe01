"""The change that makes a stage fit: settings are tried one after another, smallest first."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.doctor.dividing import divided, shares_base
from pipeline.doctor.machine import Machine
from pipeline.doctor.need import Need
from pipeline.errors import UserError

FEW_REPLIES = 16
"""Replies that a process samples together where more do not fit."""
RANK = 16
"""Of the adapters that are tried."""


def changes(stage: str, configs: Mapping[str, Any], *, machine: Machine) -> Iterator[list[str]]:
    """Yields words that make a stage's settings smaller, each time more than the time before."""
    config = configs[stage]
    first: list[str] = []
    if stage.startswith("reward") and _replies(config, machine) > FEW_REPLIES:
        first = [f"--{stage}.normalisation.batch_size={FEW_REPLIES}"]
        yield first
    smallest = first
    for word in _smaller_batches(stage, config, processes=machine.processes):
        smallest = [*first, word]
        yield smallest
    fewer = list(_fewer_prompts(stage, config, processes=machine.processes))
    yield from fewer
    if fewer:
        yield [*smallest, *fewer[-1]]
    parts = divided(machine, stage, configs).sharding.divides_state
    adapters = list(_adapters(stage, config, divided=parts))
    for words in adapters:
        yield [*smallest, *words]
    for words in adapters if fewer else []:
        yield [*smallest, *fewer[-1], *words]
    for word in _other_readings(stage, configs):
        yield [word]
        yield [*smallest, word]


def _replies(config: Any, machine: Machine) -> int:
    """Returns how many replies each process samples together to normalise scores."""
    wanted = config.normalisation
    return min(wanted.batch_size, math.ceil(wanted.num_samples / machine.processes))


def _smaller_batches(stage: str, config: Any, *, processes: int) -> Iterator[str]:
    """Yields batch sizes that the stage takes, each half of the one before or the next below."""
    section = "" if stage in ("ppo", "evaluate") else "training."
    name = "batch_size" if stage == "evaluate" else "microbatch_size"
    holder = config.training if section else config
    trains = section and not getattr(config, "take_as_is", False)
    rows = holder.minibatch_size if trains else 0  # 0: any size will do
    size = getattr(holder, name) // 2
    while size >= 1:
        if rows % (size * processes):
            size -= 1
            continue
        yield f"--{stage}.{section}{name}={size}"
        size //= 2


def _fewer_prompts(stage: str, config: Any, *, processes: int) -> Iterator[list[str]]:
    """Yields words by which ppo samples fewer replies together, each time half as many.

    So many prompts are then also a minibatch at most, and looked at in validation.
    """
    prompts = config.prompts_per_update // 2 if stage == "ppo" else 0
    while prompts >= FEW_REPLIES * processes and prompts % processes == 0:
        fewer = [f"--ppo.prompts_per_update={prompts}"]
        if prompts % config.minibatch_size:
            fewer.append(f"--ppo.minibatch_size={prompts}")
        if prompts < config.validation_prompts:
            fewer.append(f"--ppo.validation_prompts={prompts}")
        yield fewer
        prompts //= 2


def _adapters(stage: str, config: Any, *, divided: bool) -> Iterator[list[str]]:
    """Yields words by which a stage trains adapters, which divided models refuse, and in 4 bits."""
    if not hasattr(config, "lora"):
        return
    packed = f"--{stage}.lora.quantise=4bit"
    if config.lora.rank:
        if config.lora.quantise == "none":
            yield [packed]
    elif not divided:
        owners = ("ppo", "reward") if stage == "ppo" else (stage,)
        words = ["--ppo.roles=lora"] if stage == "ppo" else []
        words += [f"--{owner}.lora.rank={RANK}" for owner in owners]
        yield words
        yield [*words, packed]


def _other_readings(stage: str, configs: Mapping[str, Any]) -> Iterator[str]:
    """Yields by which word a stage that trains nothing reads models that take less."""
    config = configs[stage]
    if stage == "evaluate" and not config.on_one_base and shares_base(configs):
        yield "--evaluate.on_one_base=true"
    packable = stage == "pretrain" and config.take_as_is and not config.init_from.endswith(".gguf")
    if packable and config.quantise == "none":
        yield "--pretrain.quantise=4bit"


def mend(
    stage: str,
    configs: Mapping[str, Any],
    *,
    machine: Machine,
    attempt: Callable[[list[str]], Need],
) -> str:
    """Returns what to change so that a stage fits, or what else there is where nothing of it helps.

    Args:
        stage: that does not fit.
        configs: settings by stage.
        machine: that it is to fit on.
        attempt: returns what the stage needs with some words more; what it refuses is no help.
    """
    least = ""
    for words in changes(stage, configs, machine=machine):
        try:
            found = attempt(words)
        except UserError:  # they do not go with other settings
            continue
        size = f"{found.total / 1e9:,.1f} GB"
        if found.fits:
            return f"it fits with {' '.join(words)}: {size}"
        least = f"not even {' '.join(words)} helps ({size}): "
    return least + _last_resort(stage, configs[stage])


def _last_resort(stage: str, config: Any) -> str:
    """Returns what to do where no settings help."""
    if stage == "evaluate" or getattr(config, "take_as_is", False):
        return (
            "its models are read whole, so run it where memory is, on a processor: "
            f"CUDA_VISIBLE_DEVICES= make {stage} RECIPE={config.recipe}; or take a smaller model"
        )
    if stage == "ppo" or (hasattr(config, "lora") and config.lora.rank):  # adapters stay whole
        return "take a smaller model, or devices with more memory"
    return (
        "divide the model over more GPUs (ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml), "
        "or take a smaller one"
    )
