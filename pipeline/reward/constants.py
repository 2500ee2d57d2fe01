"""The normalisation constants: mean and deviation of the scores of the SFT model's replies."""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from pipeline.distributed import gather_objects, rank, world_size
from pipeline.errors import UserError
from pipeline.ppo.rollout import generate, uniforms
from pipeline.reward.reading import Reading, Words, cut_to, limit_of, reread
from pipeline.reward.scores import raw_scores
from pipeline.reward.settings import Normalisation
from pipeline.streams import stream
from pipeline.tokenizer import decode_response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def sample_replies(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    *,
    tokenizer: "PreTrainedTokenizerFast",
    normalisation: Normalisation,
    max_length: int | None,
    seed: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns prompts and the model's replies to them, in tokens; the processes share the work.

    Args:
        model: the SFT model.
        prompts: token ids of all training prompts.
        tokenizer: gives EOS and PAD.
        normalisation: how many replies, each to another prompt while those last, how long, and how
            many at a time.
        max_length: prompts are left out that leave no room for a whole reply; None: no bound.
        seed: seed of the choice of prompts and of sampling.

    Raises:
        UserError: no prompt leaves room.
    """
    num_samples, length = normalisation.num_samples, normalisation.response_tokens
    most = math.inf if max_length is None else max_length
    fitting = [ids for ids in prompts if len(ids) + length <= most]
    if not fitting:
        raise UserError(
            f"normalisation.response_tokens: no prompt leaves room for {length} tokens "
            f"within max_length {max_length}"
        )
    random.Random(f"{seed}/normalisation").shuffle(fitting)
    chosen = [fitting[index % len(fitting)] for index in range(num_samples)]
    mine = range(rank(), num_samples, world_size())
    replies = generate(
        model,
        [chosen[row] for row in mine],
        uniforms=uniforms(
            stream(seed, "normalisation"), update=0, rows=list(mine), positions=length
        ),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        batch_size=normalisation.batch_size,
    )
    found = dict(zip(mine, replies.responses, strict=True))
    for part in gather_objects(found):
        found.update(part)
    return chosen, [found[row] for row in range(num_samples)]


def set_constants(
    model: Any,
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    *,
    words: Words,
    reading: Reading,
) -> list[dict[str, Any]]:
    """Returns the SFT model's scored replies after setting the model's reward_mean and reward_std.

    Args:
        model: sequence classifier.
        prompts: in the SFT model's tokens.
        replies: the SFT model's, one to each.
        words: behind these tokens.
        reading: how the model reads text.

    Raises:
        UserError: all replies score the same, so there is nothing to divide by.
    """
    limit = limit_of(model.config, reading.tokenizer)
    scores = raw_scores(
        model,
        cut_to(reread(reading, words, prompts, replies), limit=limit),
        pad_id=reading.tokenizer.pad_token_id,
        separator=reading.separator,
    )
    mean, std = score_constants(scores)
    model.config.reward_mean, model.config.reward_std = mean, std
    return [
        {
            "prompt": words.tokenizer.decode(prompt),
            "response": decode_response(words.tokenizer, reply),
            "score": (float(score) - mean) / std,
        }
        for prompt, reply, score in zip(prompts, replies, scores, strict=True)
    ]


def score_constants(scores: Float[np.ndarray, " sample"]) -> tuple[float, float]:
    """Returns mean and standard deviation of the scores.

    Raises:
        UserError: all scores are the same.
    """
    std = float(np.std(scores))
    if not std > 0:
        raise UserError(
            f"all {len(scores)} replies score {float(scores[0])}: the reward model learned "
            "nothing. Raise training.learning_rate or training.epochs"
        )
    return float(np.mean(scores)), std
