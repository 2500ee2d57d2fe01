"""What was seen of a stage's rehearsal: what it holds, and every piece of its work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline.doctor.blueprint import tensors_of
from pipeline.doctor.ledger import Ledger


@dataclass(frozen=True)
class Moment:
    """A piece of a stage's work.

    Attributes:
        most: the most bytes that were alive at once, those of the models included.
        seconds: what it takes.
        flops: floating-point operations of its products.
    """

    most: float
    seconds: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Role:
    """Bytes of one of the four models of ppo.

    Attributes:
        weights: of those that no role before it holds.
        trained: of those that move.
    """

    weights: float
    trained: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was seen of a stage.

    Attributes:
        weights: bytes of all weights and buffers.
        gradients: bytes of the gradients of what is trained.
        optimizer: bytes of the optimizers' state.
        moments: pieces of its work by name.
        roles: of ppo; what is shared counts for the first that holds it.
        gathered: weights of what is outside the layers and of two layers, of the largest role:
            what a process holds whole at a time where the rest is divided.
        shared: weights that are there while a policy replies alone, and that workers share: a
            divided policy's copy, and what linear layers hold in bfloat16.
    """

    weights: float
    gradients: float
    optimizer: float
    moments: Mapping[str, Moment]
    roles: Mapping[str, Role] = field(default_factory=dict)
    gathered: float = 0.0
    shared: float = 0.0

    def at(self, layers: int, other: "Rehearsal") -> "Rehearsal":
        """Returns the rehearsal of so many layers; this one is of two layers, the other of three.

        In a single layer the embeddings are its input; from two on they are held beside it.
        """
        gathered = max((role.weights for role in self.roles.values()), default=0.0)
        return replace(self.along(other, layers - 2.0), gathered=gathered)

    def along(self, other: "Rehearsal", share: float) -> "Rehearsal":
        """Returns what lies on the line from this rehearsal, at 0, through the other, at 1."""

        def line(ours: float, theirs: float) -> float:
            return ours + share * (theirs - ours)

        moments = {
            name: Moment(
                most=line(ours.most, other.moments[name].most),
                seconds=line(ours.seconds, other.moments[name].seconds),
                flops=line(ours.flops, other.moments[name].flops),
            )
            for name, ours in self.moments.items()
        }
        return Rehearsal(
            weights=line(self.weights, other.weights),
            gradients=line(self.gradients, other.gradients),
            optimizer=line(self.optimizer, other.optimizer),
            moments=moments,
            roles={
                name: Role(
                    weights=line(role.weights, other.roles[name].weights),
                    trained=line(role.trained, other.roles[name].trained),
                )
                for name, role in self.roles.items()
            },
            gathered=self.gathered,
            shared=line(self.shared, other.shared),
        )


class Stage:
    """A stage's work on models of a blueprint, under a ledger."""

    def __init__(self, ledger: Ledger, models: Mapping[str, Any]) -> None:
        self.ledger, self.moments = ledger, dict[str, Moment]()
        self.roles = {name: self._hold(model) for name, model in models.items()}
        self.weights, self.optimizer, self.gradients, self.shared = ledger.live, 0, 0, 0

    def _hold(self, model: Any) -> Role:
        before = self.ledger.live
        self.ledger.hold(tensors_of(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        return Role(
            weights=float(self.ledger.live - before),
            trained=float(sum(p.numel() * p.element_size() for p in trained)),
        )

    def observe(self, name: str, action: Callable[[], Any]) -> None:
        """Notes what an action takes; what it returns is let go."""
        self.ledger.restart()
        action()
        most, flops = float(self.ledger.peak), float(self.ledger.flops)
        self.moments[name] = Moment(most, self.ledger.seconds, flops)

    def settle(self, optimizers: Sequence[torch.optim.Optimizer], *, foreach: bool) -> None:
        """Makes the optimizers' state, and notes the size of it and of the gradients.

        Args:
            optimizers: of all that is trained; gradients are left to it.
            foreach: whether AdamW moves all weights at once, as torch lets it on GPUs.
        """
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if "foreach" in group:
                    group["foreach"] = foreach
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
        self.gradients = self.ledger.live - self.weights
        for optimizer in optimizers:
            optimizer.step()
        self.optimizer = self.ledger.live - self.weights - self.gradients
        self.observe("step", lambda: [optimizer.step() for optimizer in optimizers])

    def share(self) -> None:
        """Notes the weights that came since what is held throughout, and go again."""
        self.shared = self.ledger.live - self.weights - self.optimizer

    def seen(self) -> Rehearsal:
        """Returns all that was noted."""
        return Rehearsal(
            weights=float(self.weights),
            gradients=float(self.gradients),
            optimizer=float(self.optimizer),
            moments=self.moments,
            roles=self.roles,
            shared=float(self.shared),
        )
