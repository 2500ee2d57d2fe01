"""Which stages cannot divide a model over processes, and what those that can hold of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.doctor.holding import BACKWARD
from pipeline.doctor.machine import Machine, Sharding
from pipeline.doctor.seen import Moment, Rehearsal, Role

BUCKET = 5 * 10**8
"""Gradients that DeepSpeed lays end to end before it adds them up (its reduce_bucket_size)."""
LIVE = 10**9
"""Weights that ZeRO 3 leaves whole once they were read (its stage3_max_live_parameters)."""

SHARDINGS = {
    "none": Sharding(),
    "fsdp2": Sharding(kind="fsdp"),
    "fsdp2_offload": Sharding(kind="fsdp", offload_weights=True, offload_optimizer=True),
}
"""What ppo's own setting means, whatever accelerate's YAML says."""


def asked(machine: Machine, stage: str, configs: Mapping[str, Any]) -> Sharding:
    """Returns how a stage is told to divide its models: by its own setting, or by the machine's.

    Where the machine says ZeRO, ppo divides as FSDP2 does; one process it leaves whole models.
    """
    own = configs["ppo"].sharding if stage == "ppo" else "auto"
    if own != "auto":
        return SHARDINGS[own]
    if stage == "ppo" and machine.sharding.divides_state:
        if machine.processes == 1:
            return SHARDINGS["none"]
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


def in_parts(rehearsal: Rehearsal, *, kind: str, narrow: bool) -> Rehearsal:
    """Returns what is held of a trained model that is to be divided, before it is.

    FSDP2 gathers weights in the precision of the products; they, their gradients and the moments
    are float32. DeepSpeed (0.19.8) keeps weights and gradients in that precision, and float32
    masters beside the moments: in ZeRO 3 of float32 the weights are these. A step turns gradients
    into float32.

    Args:
        rehearsal: of the model in the precision of its products.
        kind: none, fsdp, zero2 or zero3.
        narrow: whether that is bfloat16, half as wide.
    """
    if kind == "none":
        return rehearsal
    width, zero = (2 if narrow else 1), kind.startswith("zero")
    masters = width * rehearsal.gradients if kind == "zero2" or (zero and narrow) else 0.0
    parts = replace(
        rehearsal,
        weights=rehearsal.weights * (1 if zero else width),
        gradients=rehearsal.gradients * (1 if zero else width),
        optimizer=rehearsal.optimizer * width + masters,
        roles={
            name: Role(weights=width * role.weights, trained=width * role.trained)
            for name, role in rehearsal.roles.items()
        },
    )
    if kind == "zero3":
        live = min(rehearsal.weights, LIVE * 4 / width)
        parts = replace(parts, gathered=max(rehearsal.gathered, live))
    beside = {"pass": BUCKET * 4 / width if zero else 0.0}
    beside["step"] = width * rehearsal.gradients if zero and narrow else 0.0
    moments = {
        name: Moment(
            _held(parts, name)
            + (width if name == "step" else 1) * (moment.most - _held(rehearsal, name))
            + beside.get(name, 0.0),
            moment.seconds,
            moment.flops,
        )
        for name, moment in rehearsal.moments.items()
    }
    return replace(parts, moments=moments)


def _held(rehearsal: Rehearsal, name: str) -> float:
    """Returns the bytes that are held throughout a moment; none of them is work."""
    gradients = rehearsal.gradients if name in (*BACKWARD, "step") else 0.0
    return rehearsal.weights + rehearsal.optimizer + gradients
