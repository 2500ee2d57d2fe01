"""Seconds of a step, an update or a run, out of those of the moments that a rehearsal saw."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.doctor.lengths import Lengths
from pipeline.doctor.seen import Moment

Moments = Mapping[str, Moment]


def reply_seconds(moments: Moments, config: Any, lengths: Lengths) -> float:
    """Returns what a batch of replies takes; a token's step grows evenly with what it reads.

    Args:
        moments: of replies as long as they may be.
        config: of ppo.
        lengths: of prompts and replies; rows that have ended are no longer computed.
    """
    step = (moments["first token"].seconds + moments["last token"].seconds) / 2
    read = lengths.prompt_tokens(config.max_prompt_tokens) / config.max_prompt_tokens
    steps = lengths.reply_tokens(config.max_response_tokens) - 1
    return read * moments["prefill"].seconds + steps * step


def step_seconds(moments: Moments, training: Any, *, processes: int, share: float) -> float:
    """Returns what a step of a stage that trains one model takes.

    Args:
        moments: of rows as long as they may be.
        training: of the stage.
        processes: that share a step.
        share: of the tokens that rows may have.
    """
    passes = training.minibatch_size / training.microbatch_size / processes
    return passes * share * moments["pass"].seconds + moments["step"].seconds


def update_seconds(
    moments: Moments, config: Any, lengths: Lengths, *, processes: int, batch: int, passes: int
) -> float:
    """Returns what an update of ppo takes.

    Args:
        moments: of replies as long as they may be.
        config: of ppo.
        lengths: of prompts and replies.
        processes: that share an update.
        batch: replies that the moments are of.
        passes: microbatches that the moments "measure" and "optimise" are of.
    """
    rows, mine = (
        math.ceil(rows / processes) for rows in (config.prompts_per_update, config.minibatch_size)
    )
    micro = min(config.microbatch_size, mine)
    steps = config.optimisation.epochs * config.prompts_per_update // config.minibatch_size
    share = lengths.exchange_share(config) / passes
    learned = math.ceil(mine / micro) * share * moments["optimise"].seconds
    return (
        rows / batch * reply_seconds(moments, config, lengths)
        + math.ceil(rows / micro) * share * moments["measure"].seconds
        + steps * (learned + moments["step"].seconds)
    )


def run_seconds(
    moments: Moments, config: Any, ppo: Any, lengths: Lengths, *, processes: int
) -> float:
    """Returns what evaluate takes: replies of SFT and PPO, the best of n, and how likely they are.

    Args:
        moments: of replies as long as they may be.
        config: of evaluate.
        ppo: its settings.
        lengths: of prompts and replies.
        processes: that share the prompts.
    """
    share = lengths.exchange_share(ppo)
    drawn = len(config.draw_rows) * max(config.best_of.sizes, default=0)
    batches = config.num_prompts / config.batch_size / processes
    more = drawn / config.batch_size / processes
    reply = reply_seconds(moments, ppo, lengths) + share * moments["scores"].seconds
    reading = moments["divergence"].seconds + 2 * moments["likelihood"].seconds
    return (2 * batches + more) * reply + batches * share * reading
