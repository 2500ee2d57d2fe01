"""The language-model loss without the logits of a whole batch: chunk by chunk, while they are hot.

A batch's logits are its largest tensor by far (2,048 tokens of 8,192 words: 67 MB), and a plain
cross entropy holds them, their logarithms and their gradient. Here a chunk's logits turn into its
gradient where they are, in the processor's cache, and only the gradients of states and head are
kept.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.distributed import even_share, gather_objects, rank, world_size
from pipeline.fitting import IGNORED
from pipeline.heads import reshapes_logits
from pipeline.logprobs import picked, wide
from pipeline.optim import OptimizerKeeper
from pipeline.progress import progress
from pipeline.sharding import call_of, in_one_pass, is_partitioned

CHUNK_LOGITS = 2**22
"""Logits that exist at a time, 16 MB in float32: of 8,192 words those of 512 tokens. By 128 tokens
it takes 1.4 times as long (docs/LOG.md, 2026-11-26)."""
CHUNK_TOKENS = 128
"""Tokens whose logits exist at a time at least, however many words there are."""


def token_nll(
    hidden: Float[Tensor, "token width"],
    head: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " token"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns the summed negative log-likelihood of the targets under softmax(hidden @ head.T).

    With label smoothing e it is the cross entropy with (1 - e) on the target and e spread evenly
    over the vocabulary (Szegedy et al. 2016, eq. 6). Memory and gradients do not hold the logits:
    d/d logits = softmax - target distribution is known as soon as a chunk's logits are.

    Args:
        hidden: last hidden states, in the precision of the products.
        head: output embeddings, without bias.
        targets: token that follows each hidden state.
        label_smoothing: e, in [0, 1).
    """
    total: Tensor = _TokenNLL.apply(hidden, head, targets, label_smoothing)
    return total


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            table = head.to(hidden.dtype)
            to_hidden = torch.empty_like(hidden)
            to_head = wide(torch.zeros_like(head)) if ctx.needs_input_grad[1] else None
            total = wide(head.new_zeros(()))
            size = pieces_of(head)
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                loss, slope = _chunk(hidden[part] @ table.T, targets[part], smoothing=smoothing)
                total += loss
                slope = slope.to(hidden.dtype)
                torch.mm(slope, table, out=to_hidden[part])
                if to_head is not None:
                    to_head += slope.T @ hidden[part]
        ctx.save_for_backward(to_hidden, None if to_head is None else to_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        to_hidden, to_head = ctx.saved_tensors
        by_head = None if to_head is None else slope * to_head
        return slope.to(to_hidden.dtype) * to_hidden, by_head, None, None


def _chunk(logits: Tensor, targets: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """Returns a chunk's loss and its gradient by the logits, whose memory it takes."""
    logits = wide(logits)
    logits -= logits.max(dim=1, keepdim=True).values
    chosen = logits.gather(1, targets[:, None])[:, 0]
    mean = logits.mean(dim=1) if smoothing else torch.zeros_like(chosen)
    probabilities = logits.exp_()
    sums = probabilities.sum(dim=1, keepdim=True)
    loss = (sums[:, 0].log() - (1 - smoothing) * chosen - smoothing * mean).sum()
    slope = probabilities.div_(sums)
    if smoothing:
        slope -= smoothing / slope.shape[1]
    rows = torch.arange(len(targets), device=targets.device)
    slope[rows, targets] -= 1 - smoothing
    return loss, slope


def plain_head(model: PreTrainedModel) -> bool:
    """Returns whether a model's logits are its last hidden states times a matrix, nothing else."""
    head = model.get_output_embeddings()
    return (
        isinstance(head, nn.Linear)
        and getattr(head, "bias", None) is None
        and not reshapes_logits(model.config)
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    )


def labelled_nll(
    read: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    head: nn.Linear,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns the summed negative log-likelihood of a batch's labels; only these meet the head.

    Args:
        read: causal LM of a plain head, perhaps in wrappers.
        inputs: what it reads, and labels (`IGNORED` where a position does not count).
        head: its output embeddings. Where Accelerate divides the model, their weights are whole
            once it was read, and not before.
        label_smoothing: as in `token_nll`.
    """
    rows = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    output = read(**rows, logits_to_keep=1, output_hidden_states=True, use_cache=False)
    targets = inputs["labels"][:, 1:]
    counts = targets != IGNORED
    hidden = output.hidden_states[-1][:, :-1][counts]
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return token_nll(hidden, head.weight, targets[counts], label_smoothing=label_smoothing)


def mean_nll(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
) -> tuple[float, int]:
    """Returns the negative log-likelihood per labelled token in nats, and the number of those.

    The processes share the batches; the mean is over tokens, not over batches.

    Args:
        model: causal language model; left in the mode it was in.
        batches: input_ids, labels (-100 where a position does not count) and, where rows are
            padded, attention_mask.
    """
    was_training = model.training
    model.eval()
    found = nll_as_it_is(model, batches)
    model.train(was_training)
    return found


def nll_as_it_is(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> tuple[float, int]:
    """Returns what `mean_nll` does of a model, or a role on a base, in the mode that it is in."""
    total, count = 0.0, 0
    own = len(batches[rank() :: world_size()])
    with torch.no_grad():
        mine = even_share(batches)
        passes = progress(mine, total=len(mine), description="loss", leave=False)
        for number, batch in enumerate(passes):
            nll, tokens = _batch_nll(model, batch)
            if number < own:
                total, count = total + nll, count + tokens
    parts = gather_objects((total, count))
    tokens = sum(part[1] for part in parts)
    return math.fsum(part[0] for part in parts) / max(1, tokens), tokens


def _batch_nll(model: Any, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:].to(model.device)
    counts = targets != IGNORED
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(plain, PreTrainedModel) and plain_head(plain) and not is_partitioned(model):
        nll = in_one_pass(model, _nll_by_states, plain, inputs, targets, counts)
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        nll = -float(picked(logits[counts], targets[counts])[0].sum())
    return nll, int(counts.sum())


def _nll_by_states(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], targets: Tensor, counts: Tensor
) -> float:
    """Returns what a model of a plain head says of a batch's targets, without their logits."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][counts]
    table = model.get_output_embeddings().weight.to(hidden.dtype)
    size = pieces_of(table)
    pieces = zip(hidden.split(size), targets[counts].split(size), strict=True)
    return -math.fsum(float(picked(states @ table.T, ids)[0].sum()) for states, ids in pieces)


def pieces_of(head: Float[Tensor, "vocabulary width"]) -> int:
    """Returns the tokens whose logits exist at a time."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // len(head))


class LanguageModelTrainer(OptimizerKeeper):
    """Trainer of a causal LM whose loss never holds a batch's logits where it need not.

    In front of one of TRL's trainers it takes the loss's place there as well.
    """

    def __init__(self, *, language_model: PreTrainedModel, **arguments: Any) -> None:
        """Takes what Trainer takes, and the causal LM itself; `model` may wrap adapters in it."""
        super().__init__(**arguments)
        self.language_model = language_model
        self.model_accepts_loss_kwargs = True
        self.plain_head = plain_head(language_model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the mean loss over the labelled tokens of all processes and microbatches.

        Gradients are averaged over processes afterwards, so each process's sum is multiplied by
        their number. Where ZeRO 3 holds the head, which is read by itself here, the loss is the
        model's own.
        """
        if not self.plain_head or return_outputs or is_partitioned(model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return in_one_pass(model, self._loss, call_of(model), inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:  # noqa: ARG002
        """Returns 0: the estimate, which nobody reads, counts all weights at every step."""
        return 0

    def _loss(self, read: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Returns what `compute_loss` does, in one pass: the head is read without the model."""
        total = labelled_nll(
            read,
            inputs,
            head=self.language_model.get_output_embeddings(),
            label_smoothing=self.args.label_smoothing_factor,
        )
        return total * self.accelerator.num_processes / num_items_in_batch
