"""Training over rankings on Hugging Face's Trainer, and the model it starts from."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer
from transformers.utils import logging

from pipeline.distributed import gather_objects, rank, world_size
from pipeline.errors import UserError
from pipeline.reward.data import pad_right
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
        head = self.accelerator.unwrap_model(model).score
        scores = ranking_scores(model, inputs, head=head)
        loss = comparison_loss(
            scores, better=inputs["better"], worse=inputs["worse"], targets=inputs["labels"]
        )
        mean = loss * self.accelerator.num_processes / max(1, num_items_in_batch)
        return (mean, {"scores": scores}) if return_outputs else mean

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:  # noqa: ARG002
        """Returns 0: Trainer's estimate wants one tensor of token ids a batch."""
        return 0


def ranking_scores(
    model: nn.Module, batch: Mapping[str, Any], *, head: nn.Module
) -> Float[Tensor, " text"]:
    """Returns the raw score of every text, read at its last token.

    Args:
        model: sequence classifier, perhaps wrapped for several processes.
        batch: what `RankingCollator` returns.
        head: the classifier's own, which turns a hidden state into a score.
    """
    output = model(**batch["rows"], output_hidden_states=True, use_cache=False)
    rows, columns = batch["last"].unbind(dim=1)
    scores: Tensor = head(output.hidden_states[-1][rows, columns])[:, 0]
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def reward_model_from(
    path: Path, *, pad_id: int, seed: int, quantisation: Any = None
) -> PreTrainedModel:
    """Returns a sequence classifier with one label on the body of the causal LM in a folder.

    In float32, or the body as `pipeline.lora.quantisation` says. The head is drawn from
    N(0, 1/sqrt(d + 1)) as a standard deviation, d the model's width, so that first scores are of
    the order of 1 (Ziegler et al. 2019; Huang et al. 2024).
    """
    with _quiet_about_the_new_head():
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            quantization_config=quantisation,
        )
    model.config.pad_token_id = pad_id
    model.config.id2label, model.config.label2id = {0: "score"}, {"score": 0}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = model.score.weight
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


def average_at_first(model: PreTrainedModel, *, layers: int) -> None:
    """Sets the queries of the last layers to zero, so that they begin as means of what came before.

    A token whose query is zero attends to all tokens before it alike. A score read at the last
    token then starts as a function of the mean of the text, as a bag of words is, and training
    leaves that only where the ratings ask for it.

    Raises:
        UserError: the model has fewer layers, or does not call its query projections q_proj.
    """
    named = [(n, m) for n, m in model.named_modules() if n.endswith("q_proj")]
    if len(named) < layers:
        raise UserError(
            f"averaging_layers: {model.config.model_type} has {len(named)} layers with a q_proj, "
            f"not {layers}; set it to 0"
        )
    for _, projection in named[len(named) - layers :]:
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)


@contextlib.contextmanager
def _quiet_about_the_new_head() -> Iterator[None]:
    """Keeps Transformers from reporting the head that no causal LM has as missing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def raw_scores(
    model: nn.Module, sequences: Sequence[list[int]], *, pad_id: int, batch_size: int = 64
) -> Float[np.ndarray, " text"]:
    """Returns the raw score of each prompt + response; the processes share the texts.

    Args:
        model: sequence classifier; left in the mode it was in.
        sequences: token ids, EOS last.
        pad_id: token id of the padding.
        batch_size: texts of one forward pass; batches are cut in the order of length.

    Raises:
        UserError: a score is not finite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: dict[int, float] = {}
    for chunk in chunks[rank() :: world_size()]:
        batch = pad_right([sequences[index] for index in chunk], pad_id=pad_id)
        logits = model(**{name: ids.to(device) for name, ids in batch.items()}).logits
        found.update(zip(chunk, logits[:, 0].float().tolist(), strict=True))
    model.train(was_training)
    for part in gather_objects(found):
        found.update(part)
    scores = np.array([found[index] for index in range(len(sequences))])
    refuse_non_finite(scores)
    return scores


def refuse_non_finite(scores: Float[np.ndarray, " text"]) -> None:
    """Raises UserError when a score is not finite: the model has diverged."""
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(scores)} scores are not finite, so the reward model has diverged. "
            "Lower training.learning_rate, or set training.precision to fp32"
        )
