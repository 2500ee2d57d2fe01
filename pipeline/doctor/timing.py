"""Seconds of a step, an update or a run, out of those of the moments that a rehearsal saw."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.doctor.lengths import Lengths
from pipeline.doctor.seen import Moment

Moments = Mapping[str, Moment]


def reply_seconds(moments: Moments, config: Any, lengths: Lengths, *, batches: float) -> float:
    """Returns what replies take on one process.

    A token's step grows evenly with what it reads. A batch has as many steps as its longest reply,
    which is taken for the longest that may be; rows that have ended are no part of them.

    Args:
        moments: of a batch of replies as long as they may be.
        config: of ppo.
        lengths: of prompts and replies.
        batches: of replies, of so many rows as the moments are of; below 1: of one with fewer.
    """
    step = (moments["first token"].seconds + moments["last token"].seconds) / 2
    once = min(step, moments["lone token"].seconds)  # whatever the rows: weights are read, calls
    read = lengths.prompt_tokens(config.max_prompt_tokens) / config.max_prompt_tokens
    said = lengths.reply_tokens(config.max_response_tokens) - 1
    return (
        batches * read * moments["prefill"].seconds
        + math.ceil(batches) * (config.max_response_tokens - 1) * once
        + batches * said * (step - once)
    )


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
        reply_seconds(moments, config, lengths, batches=rows / batch)
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
    once, more = (rows / config.batch_size / processes for rows in (config.num_prompts, drawn))
    replies = 2 * reply_seconds(moments, ppo, lengths, batches=once)
    replies += reply_seconds(moments, ppo, lengths, batches=more)
    reading = moments["divergence"].seconds + 2 * moments["likelihood"].seconds
    scoring = (2 * once + more) * moments["scores"].seconds
    return replies + share * (scoring + once * reading)
