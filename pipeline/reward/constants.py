"""The normalisation constants: mean and deviation of the scores of the SFT model's replies."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
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
from pipeline.tokenizer import Prompt, decode_response, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def sample_replies(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    *,
    tokenizer: "PreTrainedTokenizerFast",
    num_samples: int,
    response_tokens: int,
    max_length: int | None,
    seed: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns prompts and the model's replies to them, in tokens; the processes share the work.

    Args:
        model: the SFT model.
        prompts: token ids of all training prompts.
        tokenizer: gives EOS and PAD.
        num_samples: replies; each to another prompt while those last.
        response_tokens: most tokens of a reply.
        max_length: prompts are left out that leave no room for a whole reply; None: no bound.
        seed: seed of the choice of prompts and of sampling.

    Raises:
        UserError: no prompt leaves room.
    """
    fitting = [
        ids for ids in prompts if max_length is None or len(ids) + response_tokens <= max_length
    ]
    if not fitting:
        raise UserError(
            f"normalisation.response_tokens: no prompt leaves room for {response_tokens} tokens "
            f"within max_length {max_length}"
        )
    random.Random(f"{seed}/normalisation").shuffle(fitting)
    chosen = [fitting[index % len(fitting)] for index in range(num_samples)]
    mine = range(rank(), num_samples, world_size())
    replies = generate(
        model,
        [chosen[row] for row in mine],
        uniforms=uniforms(
            stream(seed, "normalisation"), update=0, rows=list(mine), positions=response_tokens
        ),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    found = dict(zip(mine, replies.responses, strict=True))
    for part in gather_objects(found):
        found.update(part)
    return chosen, [found[row] for row in range(num_samples)]


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What the SFT model said, by whose scores others are normalised.

    Attributes:
        asked: prompts in tokens.
        replies: one to each.
        words: behind the tokens.
    """

    asked: list[list[int]]
    replies: list[list[int]]
    words: Words


def listen(
    sft: Any,
    prompts: Sequence[Prompt],
    *,
    tokenizer: "PreTrainedTokenizerFast",
    normalisation: Normalisation,
    max_length: int | None,
    seed: int,
) -> Replies:
    """Returns what the SFT model says, which is needed no longer then.

    Args:
        sft: causal LM that replies.
        prompts: of the training split.
        tokenizer: the SFT model's.
        normalisation: how many replies, how long.
        max_length: prompts are left out that leave no room for a whole reply; None: no bound.
        seed: seed of the choice of prompts and of sampling.

    Raises:
        UserError: no prompt leaves room.
    """
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    asked, replies = sample_replies(
        sft,
        tokens,
        tokenizer=tokenizer,
        num_samples=normalisation.num_samples,
        response_tokens=normalisation.response_tokens,
        max_length=max_length,
        seed=seed,
    )
    words = Words.behind(tokens, prompts, tokenizer=tokenizer)
    return Replies(asked=asked, replies=replies, words=words)


def set_constants(model: Any, said: Replies, *, reading: Reading) -> list[dict[str, Any]]:
    """Returns the SFT model's scored replies after setting the model's reward_mean and reward_std.

    Args:
        model: sequence classifier.
        said: by the SFT model.
        reading: how the model reads text.

    Raises:
        UserError: all replies score the same, so there is nothing to divide by.
    """
    limit = limit_of(model.config, reading.tokenizer)
    scores = raw_scores(
        model,
        cut_to(reread(reading, said.words, said.asked, said.replies), limit=limit),
        pad_id=reading.tokenizer.pad_token_id,
        separator=reading.separator,
    )
    mean, std = score_constants(scores)
    model.config.reward_mean, model.config.reward_std = mean, std
    tokenizer = said.words.tokenizer
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "response": decode_response(tokenizer, reply),
            "score": (float(score) - mean) / std,
        }
        for prompt, reply, score in zip(said.asked, said.replies, scores, strict=True)
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
