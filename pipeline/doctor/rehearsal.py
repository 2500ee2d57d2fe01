"""Every stage's own passes on tensors without contents: what they hold, how long they take.

Models of two layers and of three are rehearsed: from two on every figure is linear in the layers.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pipeline.attention import attention_of
from pipeline.doctor.blueprint import Blueprint, roles_of, tensors_of
from pipeline.doctor.ledger import Ledger, Light, hollow
from pipeline.doctor.seen import Rehearsal, Stage
from pipeline.fitting import prefer_fast_attention
from pipeline.language_loss import labelled_nll, mean_nll, plain_head
from pipeline.lora import LoRA, with_adapter
from pipeline.narrow import narrowed, only_in_products
from pipeline.optim import build_optimizer
from pipeline.ppo.cache import make_room
from pipeline.ppo.passes import Lesson, precision_context
from pipeline.ppo.rollout import Sampled, generate, sample_tokens
from pipeline.ppo.settings import Settings
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward.data import RankingCollator
from pipeline.reward.loss import comparison_loss
from pipeline.reward.scores import PASS_TEXTS, raw_scores
from pipeline.reward.training import add_dropout, ranking_scores, telling_of_packing
from pipeline.training import Training

ROLES = ("policy", "reference", "reward model", "value")
PAD, EOS, WORD = 0, 1, 2
"""Tokens of made-up rows; none of them ends."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Replies:
    """Generation: so many rows at once, tokens of each prompt and of each reply."""

    rows: int
    prompt: int
    response: int

    @property
    def prompts(self) -> list[list[int]]:
        """Made-up prompts."""
        return [[WORD] * self.prompt] * self.rows

    def sampled(self) -> tuple[list[list[int]], Sampled]:
        """Returns them, and made-up replies with their figures."""
        unknown = [torch.zeros(self.response)] * self.rows
        figures = {"logprobs": unknown, "entropy": unknown}
        return self.prompts, Sampled([[WORD] * self.response] * self.rows, figures)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How a stage goes forward and backward.

    Attributes:
        bf16: whether in bfloat16.
        narrow: whether weights are bfloat16 already where they are read, as divided ones are.
        adds_up: whether gradients of other passes are there before.
        recomputes: whether layers keep their inputs alone and are computed again on the way back.
        all_logits: whether a language model makes the loss of all its logits, as in ZeRO 3.
    """

    bf16: bool = False
    narrow: bool = False
    adds_up: bool = True
    recomputes: bool = False
    all_logits: bool = False


def training_rows(rows: int, length: int) -> dict[str, Tensor]:
    """Returns a batch of a language model; one row is a token shorter, so that there is padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -1] = 0 if rows > 1 else 1
    ids = torch.full((rows, length), WORD)
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def rehearse_language_model(
    blueprint: Blueprint,
    ledger: Ledger,
    *,
    training: Training,
    lora: LoRA,
    batch: dict[str, Tensor],
    passes: Passes,
) -> Rehearsal:
    """Returns what pretrain and sft do: passes on microbatches, steps, validation.

    Args:
        blueprint: of the model.
        ledger: that counts.
        training: of the stage.
        lora: adapters, if any.
        batch: of a pass.
        passes: how they are made.
    """
    model = blueprint.causal_lm(quantised=lora.quantise == "4bit")
    trained = _adapted(model, lora, task="CAUSAL_LM", passes=passes)
    if blueprint.packs:  # on a processor
        prefer_fast_attention(trained, bf16=passes.bf16)
    stage = Stage(ledger, {"model": trained})

    def loss() -> Tensor:
        if plain_head(model) and not passes.all_logits:
            return labelled_nll(trained, batch, head=model.get_output_embeddings())
        return trained(**batch, use_cache=False).loss

    with ledger:
        optimizer = build_optimizer(trained, training)
        stage.settle([optimizer], foreach=not blueprint.packs)
        _rehearse_training(stage, trained, loss, optimizer=optimizer, passes=passes)
        stage.observe("validation", lambda: mean_nll(trained, [batch]))
    return stage.seen()


def rehearse_measuring(
    blueprint: Blueprint, ledger: Ledger, *, batch: dict[str, Tensor], quantised: bool
) -> Rehearsal:
    """Returns what pretrain does with a model that it takes as it is: validation."""
    model = hollow(blueprint.causal_lm(quantised=quantised))
    stage = Stage(ledger, {"model": model})
    with ledger:
        stage.observe("validation", lambda: mean_nll(model, [batch]))
    return stage.seen()


def rehearse_reward(
    blueprint: Blueprint,
    ledger: Ledger,
    *,
    training: Training,
    lora: LoRA,
    batch: dict[str, Any],
    dropout: float,
    passes: Passes,
) -> Rehearsal:
    """Returns what a reward stage does: passes on microbatches of rankings, and steps.

    Args:
        blueprint: of the model below the new head.
        ledger: that counts.
        training: of the stage.
        lora: adapters, if any.
        batch: of `rankings`.
        dropout: in front of every layer.
        passes: how they are made.
    """
    model = blueprint.classifier(quantised=lora.quantise == "4bit")
    trained = _adapted(model, lora, task="SEQ_CLS", passes=passes)
    if dropout > 0:
        add_dropout(model, probability=dropout)
    if blueprint.packs:
        prefer_fast_attention(trained, bf16=passes.bf16)
    stage = Stage(ledger, {"model": trained})

    def loss() -> Tensor:
        scores = ranking_scores(trained, batch, unwrapped=trained)
        pairs = {"better": batch["better"], "worse": batch["worse"], "targets": batch["labels"]}
        return comparison_loss(scores, **pairs)

    packs = "rows" in batch and not model.is_backend_compatible()
    with telling_of_packing(model.config) if packs else contextlib.nullcontext(), ledger:
        optimizer = build_optimizer(trained, training)
        stage.settle([optimizer], foreach=not blueprint.packs)
        _rehearse_training(stage, trained, loss, optimizer=optimizer, passes=passes)
        texts = [[WORD] * batch["length"]] * PASS_TEXTS
        stage.observe("validation", lambda: raw_scores(trained, texts, pad_id=PAD))
    return stage.seen()


def rankings(*, rows: int, texts: int, prompt: int, length: int, packed: bool) -> dict[str, Any]:
    """Returns a batch of the reward stage.

    Args:
        rows: rankings.
        texts: of each ranking.
        prompt: tokens of its prompt.
        length: tokens of prompt and text together.
        packed: whether texts stand side by side in rows.
    """
    row = {
        "sequences": [[WORD] * length] * texts,
        "starts": [prompt] * texts,
        "better": torch.tensor([0]),
        "worse": torch.tensor([1]),
        "targets": torch.ones(1),
    }
    with Light():
        return RankingCollator(pad_id=PAD, packed=packed)([row] * rows) | {"length": length}


def _adapted(model: Any, lora: LoRA, *, task: str, passes: Passes) -> Any:
    with torch.device("meta"):
        trained = with_adapter(model, lora, task=task, seed=0)
    if passes.narrow:
        trained.to(torch.bfloat16)
    if passes.recomputes:
        trained.activation_checkpointing_enable()  # as Trainer does
    return hollow(trained)


def _rehearse_training(
    stage: Stage,
    model: Any,
    loss: Callable[[], Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    passes: Passes,
) -> None:
    """Notes a pass, in training mode; the optimizer is settled."""
    if not passes.adds_up:
        optimizer.zero_grad()

    def one_pass() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=passes.bf16 and not passes.narrow):
            total = loss()
        total.backward()

    model.train()
    stage.observe("pass", one_pass)
    optimizer.zero_grad()
    model.eval()


def rehearse_generation(
    blueprint: Blueprint, ledger: Ledger, replies: Replies, *, quantised: bool = False
) -> Rehearsal:
    """Returns what a causal LM takes to reply: reading the prompts, and the last token's step."""
    model = blueprint.reader(blueprint.causal_lm(quantised=quantised))
    stage = Stage(ledger, {"model": model})
    with ledger:
        rehearse_replies(stage, model, replies, precision="fp32")
    return stage.seen()


def rehearse_replies(stage: Stage, policy: Any, replies: Replies, *, precision: str) -> None:
    """Notes the reading of prompts, and the steps of the first tokens, of the last, of one row's.

    A single row's step says what every step takes, however many rows it is of.
    """
    stage.ledger.hold(tensors_of(policy))  # of a copy, which was not there before
    with precision_context(precision, CPU):
        numbers = torch.zeros(replies.rows, 1)
        stage.observe(
            "prefill",
            lambda: generate(
                policy,
                replies.prompts,
                uniforms=numbers,
                eos_id=EOS,
                pad_id=PAD,
                batch_size=replies.rows,
            ),
        )
        with narrowed(policy):  # as `generate` holds the weights for all steps
            stage.share()
            alone = replace(replies, rows=1)
            for name, those, length in (
                ("first token", replies, 2),
                ("last token", replies, replies.response),
                ("lone token", alone, replies.response // 2 + 1),
            ):
                token = _next_token(policy, those, seen=replies.prompt + length - 1)
                stage.observe(name, token)
                del token


@torch.no_grad()
def _next_token(policy: Any, replies: Replies, *, seen: int) -> Callable[[], Any]:
    """Returns the step of a decoding whose cache has room for all and holds what was seen."""
    rows, total = replies.rows, replies.prompt + replies.response
    ids, mask = torch.full((rows, 1), WORD), torch.ones(rows, seen, dtype=torch.long)
    cache = policy(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    make_room(cache, positions=total - 1, attention=attention_of(policy.config))
    for layer in cache.layers:
        _, heads, _, width = layer.keys.shape
        states = layer.keys.new_empty(rows, heads, seen - 2, width)
        layer.update(states, states)

    @torch.no_grad()
    def step() -> Any:
        output = policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.full((rows, 1), seen - 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return sample_tokens(output.logits[:, -1], torch.zeros(rows), temperature=1.0)

    return step


def rehearse_ppo(
    blueprint: Blueprint,
    ledger: Ledger,
    *,
    settings: Settings,
    roles: str,
    loras: tuple[LoRA, LoRA],
    replies: Replies,
    recomputes: bool = False,
    divided: bool = False,
) -> Rehearsal:
    """Returns what an update of ppo does: it replies, measures, scores, and optimises.

    Args:
        blueprint: of all four models.
        ledger: that counts.
        settings: of the trainer; a rollout is one minibatch of one pass or two.
        roles: separate, trunk or lora.
        loras: the policy's adapter and the reward model's.
        replies: of one worker's batch.
        recomputes: whether layers of what is trained are computed again on the way back.
        divided: whether a copy of the policy replies, and bf16 roles are bfloat16 throughout.
    """
    critic = settings.advantage.needs_value_model
    narrow = divided and settings.precision == "bf16"
    four = roles_of(
        blueprint, roles=roles, loras=loras, critic=critic, recomputes=recomputes, narrow=narrow
    )
    named = zip(ROLES, (four.policy, four.reference, four.reward_model, four.value), strict=True)
    stage = Stage(ledger, {name: role for name, role in named if role is not None})
    text = torch.full((settings.microbatch_size, replies.prompt + replies.response), WORD)
    trainer = PPOTrainer(
        four,
        [[WORD]],
        settings=settings,
        accelerator=None,  # it is asked for where processes are several
        eos_id=EOS,
        pad_id=PAD,
        text=text if settings.optimisation.ptx_coef > 0 else None,
    )
    optimizers = trainer.optimiser.optimizers.values()
    replying = _copied(blueprint, precision=settings.precision) if divided else four.policy
    prompts, sampled = replace(replies, rows=settings.minibatch_size).sampled()
    with ledger:
        stage.settle(list(optimizers), foreach=not blueprint.packs)
        for optimizer in optimizers:
            optimizer.zero_grad()
        rehearse_replies(stage, replying, replies, precision=settings.precision)
        del replying
        kept: list[Any] = []
        stage.observe("measure", lambda: kept.append(trainer.measure(prompts, sampled)))
        experience = kept.pop()
        zeros = torch.zeros(experience.mask.shape)
        lesson = Lesson(experience, zeros, zeros if critic else None, 0.0)
        with _standing_still(optimizers):
            stage.observe(
                "optimise", lambda: trainer.optimiser.run(0, lesson, steps=[], goes_on=lambda: True)
            )
        stage.observe("text", lambda: trainer.text_perplexity(text))
    return stage.seen()


@contextlib.contextmanager
def _standing_still(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Keeps optimizers from moving: their step is a moment of its own."""
    with contextlib.ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(patch.object(optimizer, "step", lambda: None))
        yield


def _copied(blueprint: Blueprint, *, precision: str) -> Any:
    """Returns a policy as `Sharded.whole` yields it: in bf16 what products read is in bfloat16."""
    model = blueprint.causal_lm().requires_grad_(False)
    products = only_in_products(model) if precision == "bf16" else set()
    for weight in model.parameters():
        if id(weight) in products:
            weight.data = weight.data.to(torch.bfloat16)
    return blueprint.reader(model)
