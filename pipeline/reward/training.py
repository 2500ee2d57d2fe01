"""Training over rankings on Hugging Face's Trainer, and the model it starts from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, Trainer

from pipeline.errors import UserError
from pipeline.models import head_of, load_with_new_head
from pipeline.reward.loss import comparison_loss


class RankingTrainer(Trainer):
    """Trainer whose rows are rankings; see `pipeline.reward.data.RankingCollator`."""

    loss_is_scaled_for_ga = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Makes Trainer count the comparisons of all processes and accumulated microbatches.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the mean loss of all comparisons of the optimizer step.

        Gradients are averaged over processes afterwards, so each process's sum is multiplied by
        their number.
        """
        scores = ranking_scores(model, inputs)
        loss = comparison_loss(
            scores, better=inputs["better"], worse=inputs["worse"], targets=inputs["labels"]
        )
        mean = loss * self.accelerator.num_processes / max(1, num_items_in_batch)
        return (mean, {"scores": scores}) if return_outputs else mean

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:  # noqa: ARG002
        """Returns 0: Trainer's estimate wants one tensor of token ids a batch."""
        return 0


def ranking_scores(model: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, " text"]:
    """Returns the raw score of every text in the order of the microbatches.

    Where the batch holds prompts apart, each is read once, with gradients, and its keys and values
    serve all texts that answer it: the scores are those of prompt + response read together, for
    less than two thirds of the work where 64 texts share a prompt.

    Args:
        model: sequence classifier, perhaps wrapped for several processes.
        batch: what `RankingCollator` returns.
    """
    if "prompts" not in batch:
        texts_read = [model(**texts).logits[:, 0].float() for texts in batch["microbatches"]]
        return torch.cat(texts_read)
    mask = batch["prompts"]["attention_mask"]
    read = model(**batch["prompts"], use_cache=True).past_key_values
    scores = []
    for texts in batch["microbatches"]:
        rows, ids = texts["prompt"], texts["input_ids"]
        positions = mask.sum(dim=1)[rows, None] + torch.arange(ids.shape[1], device=ids.device)
        output = model(
            input_ids=ids,
            attention_mask=torch.cat([mask[rows], texts["attention_mask"]], dim=1),
            position_ids=positions,
            past_key_values=DynamicCache(
                [(layer.keys[rows], layer.values[rows]) for layer in read.layers]
            ),
            use_cache=True,
        )
        scores.append(output.logits[:, 0].float())
    return torch.cat(scores)


def reward_model_from(path: Path | str, *, pad_id: int, seed: int) -> PreTrainedModel:
    """Returns a sequence classifier with one label on the body of the model in a folder.

    The last layer is drawn from N(0, 1/sqrt(d + 1)) as a standard deviation, d its inputs, so
    that first scores are of the order of 1 (Ziegler et al. 2019; Huang et al. 2024).
    """
    model = load_with_new_head(path, pad_id=pad_id, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = head_of(model).weight
        spread = 1 / math.sqrt(weight.shape[1] + 1)
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model


def add_dropout(model: PreTrainedModel, *, probability: float) -> None:
    """Puts dropout in front of every layer, active in training mode only.

    Most decoder families have none between their layers; a few thousand ratings need some. The
    saved model is the same with and without it.

    Raises:
        UserError: the model has no list of layers.
    """
    layers = [part for part in model.base_model.children() if isinstance(part, nn.ModuleList)]
    if not layers:
        raise UserError(f"dropout: {model.config.model_type} has no list of layers; set it to 0")

    def drop(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = nn.functional.dropout(inputs[0], probability, training=layer.training)
        return (hidden, *inputs[1:])

    for layer in layers[0]:
        layer.register_forward_pre_hook(drop)
