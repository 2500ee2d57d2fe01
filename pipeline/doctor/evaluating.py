"""Evaluate's passes on tensors without contents; those of other stages are in `rehearsal`."""

from typing import Any

import torch

from pipeline.doctor.blueprint import Blueprint, policies_on_one_base
from pipeline.doctor.ledger import Ledger
from pipeline.doctor.rehearsal import PAD, WORD, Replies, rehearse_replies, training_rows
from pipeline.doctor.seen import Rehearsal, Stage
from pipeline.evaluation.alignment_tax import rows_per_pass
from pipeline.evaluation.likelihood import Batching, divergence, negative_log_likelihood
from pipeline.language_loss import nll_as_it_is
from pipeline.lora import LoRA, with_adapter
from pipeline.ppo.scorers import token_scorer

NO_LORA = LoRA()


def rehearse_policies(
    blueprint: Blueprint, ledger: Ledger, replies: Replies, *, lora: LoRA | None = None
) -> Rehearsal:
    """Returns what evaluate does with SFT and PPO: replies, divergence, text.

    Args:
        blueprint: of both.
        ledger: that counts.
        replies: of a batch.
        lora: PPO's adapter, where both read through one base; None where they are two models.
    """
    if lora is None:
        sft, ppo = (blueprint.reader(blueprint.causal_lm()) for _ in range(2))
    else:
        sft, ppo = policies_on_one_base(blueprint, lora)
    stage = Stage(ledger, {"sft": sft, "ppo": ppo})
    length = replies.prompt + replies.response
    text = training_rows(rows_per_pass(length, vocabulary=sft.config.vocab_size), length)
    with ledger:
        rehearse_replies(stage, ppo, replies, precision="fp32")
        stage.observe("divergence", lambda: divergence(ppo, reference=sft, **_said(replies)))
        stage.observe("text", lambda: nll_as_it_is(ppo, [text]))
    return stage.seen()


def rehearse_pretrained(
    blueprint: Blueprint, ledger: Ledger, replies: Replies, *, quantised: bool = False
) -> Rehearsal:
    """Returns what evaluate does with the pretrained model, which reads replies."""
    model = blueprint.reader(blueprint.causal_lm(quantised=quantised))
    stage = Stage(ledger, {"pretrain": model})
    with ledger:
        stage.observe("likelihood", lambda: negative_log_likelihood(model, **_said(replies)))
    return stage.seen()


def rehearse_scoring(
    blueprint: Blueprint,
    ledger: Ledger,
    replies: Replies,
    *,
    lora: LoRA = NO_LORA,
    quantised: bool = False,
) -> Rehearsal:
    """Returns what evaluate does with the reward model, which scores replies.

    Args:
        blueprint: of the model below the head.
        ledger: that counts.
        replies: of a batch.
        lora: the adapter that is on it, where it is not merged.
        quantised: whether its body is in 4 bits.
    """
    model = blueprint.classifier(quantised=quantised)
    with torch.device("meta"):
        with_adapter(model, lora, task="SEQ_CLS", seed=0)
    model = blueprint.reader(model.eval())
    stage = Stage(ledger, {"reward": model})
    scorer = token_scorer(model, pad_id=PAD, batch_size=replies.rows)
    with ledger:
        stage.observe("scores", lambda: scorer(replies.prompts, _responses(replies)))
    return stage.seen()


def _said(replies: Replies) -> dict[str, Any]:
    return {
        "prompts": replies.prompts,
        "responses": _responses(replies),
        "batching": Batching(pad_id=PAD, batch_size=replies.rows),
    }


def _responses(replies: Replies) -> list[list[int]]:
    return [[WORD] * replies.response] * replies.rows
