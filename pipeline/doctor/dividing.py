"""Which stages cannot divide a model over processes, and which hold adapters on one base."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.doctor.machine import Machine, Sharding

SHARDINGS = {
    "none": Sharding(),
    "fsdp2": Sharding(kind="fsdp"),
    "fsdp2_offload": Sharding(kind="fsdp", offload_weights=True, offload_optimizer=True),
}
"""What ppo's own setting means, whatever accelerate's YAML says."""


def asked(machine: Machine, stage: str, configs: Mapping[str, Any]) -> Sharding:
    """Returns how a stage is told to divide its models: by its own setting, or by the machine's.

    Where the machine says ZeRO, ppo divides as FSDP2 does.
    """
    own = configs["ppo"].sharding if stage == "ppo" else "auto"
    if own != "auto":
        return SHARDINGS[own]
    if stage == "ppo" and machine.sharding.divides_state:
        return SHARDINGS["fsdp2_offload" if machine.sharding.offloads else "fsdp2"]
    return machine.sharding


def divided(machine: Machine, stage: str, configs: Mapping[str, Any]) -> Machine:
    """Returns the machine with a stage's models divided as it divides them there, or whole."""
    sharding = asked(machine, stage, configs)
    whole = keeps_whole(stage, configs, kind=sharding.kind)
    return replace(machine, sharding=Sharding() if whole else sharding)


def refuses(stage: str, configs: Mapping[str, Any], *, kind: str) -> bool:
    """Returns whether a stage does not run where models are to be divided.

    Args:
        stage: its name.
        configs: settings by stage.
        kind: none, fsdp, zero2 or zero3.
    """
    if kind == "none" or stage in ("pretrain", "evaluate"):
        return False
    return configs["ppo"].roles != "separate" if stage == "ppo" else configs[stage].lora.rank > 0


def keeps_whole(stage: str, configs: Mapping[str, Any], *, kind: str) -> bool:
    """Returns whether each process holds a stage's models whole though they are to be divided."""
    measured = stage == "pretrain" and configs["pretrain"].take_as_is
    reads = measured or stage == "evaluate"
    return kind != "none" and (reads or refuses(stage, configs, kind=kind))


def shares_base(configs: Mapping[str, Any]) -> bool:
    """Returns whether ppo and reward leave adapters on one base, as evaluate can read them."""
    return configs["ppo"].roles == "lora" and configs["reward"].lora.rank > 0
