"""The raw scores of whole texts, as the processes share them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pipeline.distributed import even_share, gather_objects
from pipeline.errors import UserError
from pipeline.models import whole_text_scores
from pipeline.sequences import by_length

PASS_TEXTS = 64
"""Texts of a forward pass, at most."""
PASS_TOKENS = 2**14
"""Most tokens of a forward pass over texts: 64 texts of 256, or 10 of 1,536."""


def raw_scores(
    model: Any,
    sequences: Sequence[list[int]],
    *,
    pad_id: int,
    separator: int | None = None,
    batch_size: int = PASS_TEXTS,
) -> Float[np.ndarray, " text"]:
    """Returns the raw score of each prompt + response; the processes share the texts.

    Args:
        model: sequence classifier; left in the mode it was in.
        sequences: token ids, EOS last.
        pad_id: token id of the padding.
        separator: token that ends the first segment of a pair; None without segments.
        batch_size: texts of one forward pass, fewer where they are long; batches are cut in the
            order of length.

    Raises:
        UserError: a score is not finite.
    """
    was_training = model.training
    model.eval()
    found: dict[int, float] = {}
    lengths = [len(ids) for ids in sequences]
    few = max(1, PASS_TOKENS // max(lengths, default=1))
    chunks = by_length(lengths, batch_size=min(batch_size, few))
    for chunk in even_share(chunks):
        texts = [sequences[index] for index in chunk]
        scores = whole_text_scores(
            model, texts, pad_id=pad_id, separator=separator, batch_size=batch_size
        )
        found.update(zip(chunk, scores.tolist(), strict=True))
    model.train(was_training)
    for part in gather_objects(found):
        found.update(part)
    raw = np.array([found[index] for index in range(len(sequences))])
    refuse_non_finite(raw)
    return raw


def refuse_non_finite(scores: Float[np.ndarray, " text"]) -> None:
    """Raises UserError when a score is not finite: the model has diverged."""
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(scores)} scores are not finite, so the reward model has diverged. "
            "Lower training.learning_rate, or set training.precision to fp32"
        )
