"""What scores a response: models and functions, alone or together.

A scorer returns the scores of the rows that it is given. A model's works on its own process alone.
Those of `Rewards` are given all rows of a rollout on every process and return the same scores on
each: `Divided` has the processes share the rows of a model's, `FunctionScorer` asks once for all.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import distributed
from pipeline.attention import pack
from pipeline.config import require
from pipeline.models import reads_last_token, score_responses, whole_text_scores
from pipeline.ppo.order import interleave
from pipeline.reward.reading import Reading, TokenReading, Words, cut_to, limit_of, reread

log = logging.getLogger(__name__)

Rows = Sequence[list[int]]
Scorer = Callable[[Rows, Rows], Float[Tensor, " response"]]
"""Prompts and responses in the policy's tokens in, scores out; higher is better."""


def token_scorer(model: Any, *, pad_id: int, batch_size: int, workers: int = 1) -> Scorer:
    """Returns one process's scorer by a model that reads the policy's tokens."""
    return partial(score_responses, model, pad_id=pad_id, batch_size=batch_size, workers=workers)


@dataclass(frozen=True, kw_only=True)
class TextScorer:
    """One process's scorer by a model that reads the text anew, with its own tokenizer.

    A text beyond the model's context keeps its first token and its end: the prompt's beginning
    is cut. How many were is logged.
    """

    name: str
    model: Any
    reading: Reading
    words: Words
    batch_size: int
    workers: int = 1

    def __call__(self, prompts: Rows, responses: Rows) -> Float[Tensor, " response"]:
        """Returns normalised scores."""
        texts = self.fitting(reread(self.reading, self.words, prompts, responses))
        raw = whole_text_scores(
            self.model,
            texts,
            pad_id=self.reading.tokenizer.pad_token_id,
            separator=self.reading.separator,
            batch_size=self.batch_size,
            workers=self.workers,
        )
        return (raw - self.model.config.reward_mean) / self.model.config.reward_std

    def fitting(self, texts: list[list[int]]) -> list[list[int]]:
        """Returns the texts within the model's context."""
        limit = limit_of(self.model.config, self.reading.tokenizer)
        num_long = sum(len(ids) > limit for ids in texts)
        if num_long:
            log.warning(
                "score/%s: %d of %d texts are longer than its context of %d tokens; the beginning "
                "of their prompts is cut", self.name, num_long, len(texts), limit,
            )  # fmt: skip
        return cut_to(texts, limit=limit)


def model_scorer(
    model: Any, reading: Reading, *, words: Words, name: str, batch_size: int, workers: int = 1
) -> Scorer:
    """Returns one process's scorer by a model, as it reads text; with other tokens it is logged.

    Args:
        model: a classifier with one label.
        reading: how it reads.
        words: behind the policy's tokens.
        name: of the source, for the log.
        batch_size: rows of one forward pass.
        workers: passes side by side.

    Raises:
        UserError: the model has the policy's tokens but no head that reads the last of them.
    """
    if not isinstance(reading, TokenReading):
        kind = "a conversation" if reading.tokenizer.chat_template else "a pair of texts"
        log.info("score/%s: read anew by a tokenizer of its own, as %s", name, kind)
        return TextScorer(
            name=name,
            model=model,
            reading=reading,
            words=words,
            batch_size=batch_size,
            workers=workers,
        )
    require(
        reads_last_token(model),
        f"score/{name}: a {model.config.model_type} encoder needs a tokenizer of its own",
    )
    if isinstance(model, PreTrainedModel):  # an adapter reads as its base does
        pack(model)
    pad_id = reading.tokenizer.pad_token_id
    return token_scorer(model, pad_id=pad_id, batch_size=batch_size, workers=workers)


@dataclass(frozen=True)
class Divided:
    """A scorer whose rows are divided over the processes."""

    scorer: Scorer

    def __call__(self, prompts: Rows, responses: Rows) -> Float[Tensor, " response"]:
        """Returns the scores of all rows."""
        share = distributed.even_share(range(len(prompts)))
        scores = self.scorer([prompts[row] for row in share], [responses[row] for row in share])
        shares = distributed.gather_objects(scores.cpu())
        return torch.stack(interleave([list(share) for share in shares])[: len(prompts)])


@dataclass(frozen=True)
class Rewards:
    """Everything that scores a rollout, and how it becomes one score.

    Attributes:
        scorers: by the name of their metric.
        weights: one each; for sum and mean.
        combine: sum, mean, min or mean_minus_std.
        measured: normalisation constants that were measured for this run, by scorer.
    """

    scorers: Mapping[str, Scorer]
    weights: Sequence[float] = (1.0,)
    combine: str = "sum"
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def measure(self, prompts: Rows, responses: Rows) -> dict[str, Float[Tensor, " response"]]:
        """Returns the scores by each scorer."""
        return {name: scorer(prompts, responses) for name, scorer in self.scorers.items()}

    def together(self, parts: Mapping[str, Float[Tensor, " response"]]) -> Tensor:
        """Returns one score per response out of those by each scorer."""
        return combined(
            torch.stack([part.double() for part in parts.values()]),
            weights=self.weights,
            combine=self.combine,
        )


def combined(
    scores: Float[Tensor, "source response"], *, weights: Sequence[float], combine: str
) -> Float[Tensor, "response"]:
    """Returns sum_i w_i s_i, that over sum_i w_i, min_i s_i, or mean_i s_i - std_i s_i.

    The last two are for ensembles: what only some members like is a mistake of theirs (Coste et
    al. 2024, section 3; there the variance is taken off). The deviation is the population's.
    """
    if combine == "min":
        return scores.amin(dim=0)
    if combine == "mean_minus_std":
        return scores.mean(dim=0) - scores.std(dim=0, unbiased=False)
    weight = torch.tensor(weights, dtype=scores.dtype)
    total = (weight[:, None] * scores).sum(dim=0)
    return total / math.fsum(weights) if combine == "mean" else total
