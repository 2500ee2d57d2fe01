"""Training over rankings on Hugging Face's Trainer, and the model it starts from."""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.distributed import in_step
from pipeline.errors import UserError, told
from pipeline.logprobs import wide
from pipeline.models import head_of, load_with_new_head
from pipeline.optim import OptimizerKeeper
from pipeline.reward.data import RankingCollator
from pipeline.reward.loss import comparison_loss
from pipeline.sharding import call_of, in_one_pass, is_in_parts
from pipeline.streams import stream

ROUNDING = 1e-3
"""Largest difference of two scores, which are of the order of 1, that is put down to rounding."""


class RankingTrainer(OptimizerKeeper):
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
        if "chunks" in inputs and is_in_parts(model):
            inputs = inputs | {"chunks": in_step(inputs["chunks"])}
        unwrapped = self.accelerator.unwrap_model(model)
        loss, scores = in_one_pass(model, _summed, call_of(model), inputs, unwrapped)
        mean = loss * self.accelerator.num_processes / max(1, num_items_in_batch)
        return (mean, {"scores": scores}) if return_outputs else mean

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:  # noqa: ARG002
        """Returns 0: Trainer's estimate wants one tensor of token ids a batch."""
        return 0


def _summed(
    model: Callable[..., Any], batch: Mapping[str, Any], unwrapped: Any
) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of a batch, and its scores without gradient."""
    scores = ranking_scores(model, batch, unwrapped=unwrapped)
    loss = comparison_loss(
        scores, better=batch["better"], worse=batch["worse"], targets=batch["labels"]
    )
    return loss, scores.detach()


def ranking_scores(
    model: Callable[..., Any], batch: Mapping[str, Any], *, unwrapped: Any
) -> Float[Tensor, " text"]:
    """Returns the raw score of every text; of packed ones, the head's at their last tokens.

    Args:
        model: sequence classifier, perhaps wrapped for several processes, or its forward.
        batch: what `RankingCollator` returns.
        unwrapped: the classifier itself, whose head reads packed texts.
    """
    if "chunks" in batch:
        scores = torch.cat([model(**chunk).logits[:, 0] for chunk in batch["chunks"]])
        return wide(scores[batch["place"]])
    visible = batch["rows"]["attention_mask"]
    # Added to the attention's logits: plain attention would add True and False as 1 and 0.
    mask = torch.zeros(visible.shape, dtype=unwrapped.dtype, device=visible.device)
    mask = mask.masked_fill(~visible, torch.finfo(unwrapped.dtype).min)
    read = batch["rows"] | {"attention_mask": mask}
    output = model(**read, output_hidden_states=True, use_cache=False)
    rows, columns = batch["last"].unbind(dim=1)
    return wide(unwrapped.score(output.hidden_states[-1][rows, columns])[:, 0])


def reward_model_from(
    path: Path | str, *, pad_id: int, seed: int, quantisation: Any = None
) -> PreTrainedModel:
    """Returns a sequence classifier with one label on the body of the model in a folder.

    In float32, or the body as `pipeline.lora.quantisation` says. The last layer is drawn from
    N(0, 1/sqrt(d + 1)) as a standard deviation, d its inputs, so that first scores are of the
    order of 1 (Ziegler et al. 2019; Huang et al. 2024).
    """
    model = load_with_new_head(path, pad_id=pad_id, seed=seed, quantisation=quantisation)
    generator = torch.Generator().manual_seed(stream(seed, "score"))
    with torch.no_grad():
        weight = head_of(model).weight
        spread = 1 / math.sqrt(weight.shape[1] + 1)
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises UserError where a model does not read packed texts as it reads each by itself.

    Tried with models whose layers do not take their attention by name: some read no mask but one of
    padding (BLOOM).
    """
    if model.is_backend_compatible() or is_in_parts(model) or model.device.type != "cpu":
        return
    prompt, texts = [1, 2], [[3, 4, 5], [6], [7, 8]]
    row = {
        "sequences": [[*prompt, *text] for text in texts],
        "starts": [len(prompt)] * len(texts),
        **{name: torch.zeros(0) for name in ("better", "worse", "targets")},
    }
    together, apart = (
        RankingCollator(pad_id=model.config.pad_token_id, packed=packed)([row])
        for packed in (True, False)
    )
    alone = ranking_scores(model, apart, unwrapped=model)
    with telling_of_packing(model.config):
        scores = ranking_scores(model, together, unwrapped=model)
        if not torch.allclose(scores, alone, rtol=ROUNDING, atol=ROUNDING):
            raise ValueError("it reads them otherwise than alone")


def telling_of_packing(config: Any) -> contextlib.AbstractContextManager[None]:
    """Returns the context of a trial in which whatever is raised says that texts are not packed."""
    what = f"pack: {config.model_type} does not read texts side by side"
    return told(what, mend="Set pack of the reward stage to false")


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
