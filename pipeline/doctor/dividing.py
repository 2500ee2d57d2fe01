"""Which stages cannot divide a model over processes, and which hold adapters on one base."""

from collections.abc import Mapping
from typing import Any


def refuses(stage: str, configs: Mapping[str, Any], *, kind: str) -> bool:
    """Returns whether a stage does not run where models are to be divided.

    Args:
        stage: its name.
        configs: settings by stage.
        kind: none, fsdp, zero2 or zero3.
    """
    if kind == "none" or stage == "pretrain":
        return False
    if stage == "ppo":
        return kind != "fsdp" or configs["ppo"].roles != "separate"
    return stage == "evaluate" or configs[stage].lora.rank > 0


def keeps_whole(stage: str, configs: Mapping[str, Any], *, kind: str) -> bool:
    """Returns whether each process holds a stage's models whole though they are to be divided."""
    measured = stage == "pretrain" and configs["pretrain"].take_as_is
    return kind != "none" and (measured or refuses(stage, configs, kind=kind))


def shares_base(configs: Mapping[str, Any]) -> bool:
    """Returns whether ppo and reward leave adapters on one base, as evaluate can read them."""
    return configs["ppo"].roles == "lora" and configs["reward"].lora.rank > 0
