"""The optimizer of a model: AdamW, or Muon for the body's matrices beside AdamW for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training import Training


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
    }
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            [group for group in (decayed, still) if group["params"]], **settings
        )
    muon = torch.optim.Muon(
        matrices,
        lr=training.muon_learning_rate,
        weight_decay=training.weight_decay,
        adjust_lr_fn="original",
    )
    return MuonAdamW([muon, torch.optim.AdamW([still], **settings)])
