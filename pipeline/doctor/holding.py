"""What a moment of a stage takes of one device, divided as the machine says."""

from pipeline.doctor.machine import Machine
from pipeline.doctor.need import Peak
from pipeline.doctor.seen import Rehearsal

REPLYING = ("prefill", "first token", "last token")
BACKWARD = ("pass", "optimise")
"""Moments that go backward, with all gradients of what is trained beside them."""


def peak_of(
    machine: Machine,
    rehearsal: Rehearsal,
    name: str,
    *,
    gradients: bool = False,
    workers: int = 1,
    extra: float = 0.0,
) -> Peak:
    """Returns what a moment takes of a device.

    Args:
        machine: whose device it is.
        rehearsal: of the stage.
        name: of the moment.
        gradients: whether all gradients are held while it lasts.
        workers: passes side by side, each with gradients of its own.
        extra: bytes beside it.
    """
    held = rehearsal.weights + rehearsal.optimizer + gradients * rehearsal.gradients
    working = max(0.0, rehearsal.moments[name].most - held)
    if name == "step":
        working *= _state_share(machine)
    once = rehearsal.shared if name in REPLYING else 0.0
    extra += once + workers * (working - once) + gradients * (workers - 1) * rehearsal.gradients
    return held_at(machine, rehearsal, name, gradients=gradients, extra=extra)


def held_at(
    machine: Machine, rehearsal: Rehearsal, name: str, *, gradients: bool = True, extra: float
) -> Peak:
    """Returns what is held throughout, divided as the machine says, and what comes on top.

    A divided policy replies as a copy, which gathers nothing (`Sharded.whole`). FSDP2 has the
    gradients of what is gathered whole, too, before it adds them up.
    """
    sharding, state = machine.sharding, _state_share(machine)
    weights, gathered = rehearsal.weights, 0.0
    if sharding.divides_weights:
        weights = 0.0 if sharding.offload_weights else weights / machine.processes
        gathered = rehearsal.gathered * (name not in ("step", *REPLYING))
        gathered *= 2 if name in BACKWARD and sharding.kind == "fsdp" else 1
    return Peak(
        moment=name,
        weights=weights,
        gradients=gradients * rehearsal.gradients * state,
        optimizer=rehearsal.optimizer * state,
        working=extra + gathered,
    )


def _state_share(machine: Machine) -> float:
    """Returns the share of gradients and moments that a device holds and works on."""
    if machine.sharding.offload_optimizer:
        return 0.0
    return 1 / machine.processes if machine.sharding.divides_state else 1.0
