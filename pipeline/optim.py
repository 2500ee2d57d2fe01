"""The optimizer of a model: AdamW, or Muon for the body's matrices beside AdamW for the rest."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Trainer

from pipeline.models import choose_precision
from pipeline.training import Training

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, steep at zero (Jordan et al. 2024)."""
ITERATIONS = 5
MOMENTUM = 0.95
PRODUCTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precision of Muon's products: that of the model's own."""
TINY = 1e-7
"""Keeps the division by a zero matrix's norm finite."""


def orthogonalised(
    matrix: Float[Tensor, "rows columns"], *, dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """Returns about the nearest semi-orthogonal matrix: singular values near 1, vectors kept.

    Newton-Schulz (Jordan et al. 2024): X <- a X + (b A + c A A) X with A = X X^T, from X / |X|.

    Args:
        matrix: a momentum of gradients.
        dtype: precision of the products.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is orthogonalised (Jordan et al. 2024).

    torch.optim.Muon always multiplies in bfloat16, which takes 30 to 60 times as long as float32 on
    a processor without bfloat16 instructions; this one is told its precision.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all matrices once and returns the closure's loss."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
                    self._move(matrix, matrix.grad, **rates)
        return loss

    def _move(self, matrix: Tensor, gradient: Tensor, *, lr: float, weight_decay: float) -> None:
        state = self.state[matrix]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
        momentum.lerp_(gradient, 1 - MOMENTUM)
        nesterov = gradient.lerp(momentum, MOMENTUM)
        matrix.mul_(1 - lr * weight_decay)
        scale = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
        matrix.add_(orthogonalised(nesterov, dtype=self.dtype), alpha=-lr * scale)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW behind the interface of one optimizer.

    Both halves work on this object's parameter groups and state, so learning-rate schedules,
    `state_dict` and `load_state_dict` see a single optimizer. Muon orthogonalises the update of
    each hidden matrix (Jordan et al. 2024); embeddings, heads, norms and biases are not matrices
    in that sense and keep AdamW.
    """

    def __init__(self, halves: list[torch.optim.Optimizer]) -> None:
        self.halves = halves
        super().__init__([group for half in halves for group in half.param_groups], {})
        self._num_groups = [len(half.param_groups) for half in halves]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters once and returns the closure's loss."""
        loss = closure() if closure is not None else None
        start = 0
        for half, num_groups in zip(self.halves, self._num_groups, strict=True):
            half.param_groups = self.param_groups[start : start + num_groups]
            half.state = self.state
            half.step()
            start += num_groups
        return loss


class OptimizerKeeper(Trainer):
    """Trainer that trains with the optimizer it is given, however its model is divided.

    Given at its making, Trainer refuses one where FSDP divides the model, and DeepSpeed's
    integration in Transformers throws it away and asks for Trainer's own.
    """

    optimizer: torch.optim.Optimizer | None
    given: torch.optim.Optimizer | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer that was given, or where none was, Trainer's own."""
        self.optimizer = self.optimizer or self.given
        return super().create_optimizer(model)


K = TypeVar("K", bound=OptimizerKeeper)


def given(trainer: K, optimizer: torch.optim.Optimizer) -> K:
    """Returns a trainer with the optimizer that it is to train with."""
    trainer.optimizer = trainer.given = optimizer
    return trainer


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns the body's matrices, embeddings and heads, and everything of fewer dimensions.

    The body is the model below its head (`base_model`); tied weights appear once.
    """
    body = {id(p) for p in getattr(model, "base_model", model).parameters()}
    tables = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    matrices: list[Tensor] = []
    outer: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2 and id(parameter) in body and id(parameter) not in tables:
            matrices.append(parameter)
        else:
            outer.append(parameter)
    return matrices, outer, vectors


def build_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Returns the optimizer that the settings ask for, over the model's trainable parameters."""
    matrices, outer, vectors = split_parameters(model)
    still = {"params": outer + vectors, "weight_decay": 0.0}
    decayed = {"params": matrices, "weight_decay": training.weight_decay}
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.beta1, training.beta2),
        "eps": training.epsilon,
    }
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            [group for group in (decayed, still) if group["params"]], **settings
        )
    muon = Muon(
        matrices,
        lr=training.muon_learning_rate,
        weight_decay=training.weight_decay,
        dtype=PRODUCTS[choose_precision(training.precision)],
    )
    return MuonAdamW([muon, torch.optim.AdamW([still], **settings)])
