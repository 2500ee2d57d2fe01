"""Every stage's own passes, rehearsed on tensors without contents: what they hold, how long they take.

Models of one layer and of two are rehearsed: every figure is linear in the number of layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.doctor.blueprint import Blueprint, roles_of, tensors_of
from pipeline.doctor.ledger import Ledger, hollow
from pipeline.fitting import mean_nll, prefer_fast_attention
from pipeline.language_loss import labelled_nll, plain_head
from pipeline.lora import LoRA, with_adapter
from pipeline.models import last_token_scores
from pipeline.optim import build_optimizer
from pipeline.ppo.cache import make_room
from pipeline.ppo.passes import Lesson, precision_context
from pipeline.ppo.rollout import Sampled, generate, sample_tokens
from pipeline.ppo.settings import Settings
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward.data import RankingCollator
from pipeline.reward.loss import comparison_loss
from pipeline.reward.training import add_dropout, ranking_scores
from pipeline.training import Training

PAD, EOS, WORD = 0, 1, 2
"""Tokens of made-up rows; none of them ends."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Moment:
    """A piece of a stage's work.

    Attributes:
        most: the most bytes that were alive at once, those of the models included.
        seconds: what it takes.
        flops: floating-point operations of its products.
    """

    most: float
    seconds: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was seen of a stage.

    Attributes:
        weights: bytes of all weights and buffers.
        gradients: bytes of the gradients of what is trained.
        optimizer: bytes of the optimizers' state.
        moments: pieces of its work by name.
    """

    weights: float
    gradients: float
    optimizer: float
    moments: Mapping[str, Moment]

    def at(self, layers: int, other: "Rehearsal") -> "Rehearsal":
        """Returns the rehearsal of so many layers; this one is of one layer, the other of two."""

        def line(ours: float, theirs: float) -> float:
            return ours + (layers - 1) * (theirs - ours)

        moments = {
            name: Moment(
                most=line(ours.most, other.moments[name].most),
                seconds=line(ours.seconds, other.moments[name].seconds),
                flops=line(ours.flops, other.moments[name].flops),
            )
            for name, ours in self.moments.items()
        }
        return Rehearsal(
            weights=line(self.weights, other.weights),
            gradients=line(self.gradients, other.gradients),
            optimizer=line(self.optimizer, other.optimizer),
            moments=moments,
        )


class Stage:
    """A stage's work on models of a blueprint, under a ledger."""

    def __init__(self, ledger: Ledger, models: Sequence[Any]) -> None:
        self.ledger, self.moments = ledger, dict[str, Moment]()
        ledger.hold(tensors_of(models))
        self.weights, self.optimizer, self.gradients = ledger.live, 0, 0

    def observe(self, name: str, action: Callable[[], Any]) -> None:
        """Notes what an action takes; what it returns is let go."""
        self.ledger.restart()
        action()
        self.moments[name] = Moment(self.ledger.peak, self.ledger.seconds, self.ledger.flops)

    def settle(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Makes the optimizers' state, and notes the size of it and of the gradients."""

        def step() -> None:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.empty_like(parameter)
            self.gradients = self.ledger.live - self.weights
            for optimizer in optimizers:
                optimizer.step()

        step()
        self.optimizer = self.ledger.live - self.weights - self.gradients
        self.observe("step", lambda: [optimizer.step() for optimizer in optimizers])

    def seen(self) -> Rehearsal:
        """Returns all that was noted."""
        return Rehearsal(
            weights=self.weights,
            gradients=self.gradients,
            optimizer=self.optimizer,
            moments=self.moments,
        )


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
    training: Training | None,
    lora: LoRA,
    batch: dict[str, Tensor],
    bf16: bool,
) -> Rehearsal:
    """Returns what pretrain and sft do: passes on microbatches, steps, validation.

    Args:
        blueprint: of the model.
        ledger: that counts.
        training: of the stage; None where the model is only measured.
        lora: adapters, if any.
        batch: of a pass.
        bf16: whether passes are in bfloat16.
    """
    model = blueprint.causal_lm(quantised=lora.quantise == "4bit")
    trained = _adapted(model, lora, task="CAUSAL_LM")
    if blueprint.packs:  # on a processor
        prefer_fast_attention(trained, bf16=bf16 and training is not None)
    stage = Stage(ledger, [trained])

    def loss() -> Tensor:
        if plain_head(model):
            head = model.get_output_embeddings().weight
            return labelled_nll(trained, batch, head=head)
        return trained(**batch, use_cache=False).loss

    with ledger:
        if training is not None:
            _rehearse_training(stage, trained, loss, training=training, bf16=bf16)
        stage.observe("validation", lambda: mean_nll(trained, [batch]))
    return stage.seen()


def rehearse_reward(
    blueprint: Blueprint,
    ledger: Ledger,
    *,
    training: Training,
    lora: LoRA,
    batch: dict[str, Any],
    dropout: float,
    bf16: bool,
) -> Rehearsal:
    """Returns what a reward stage does: passes on microbatches of rankings, and steps.

    Args:
        blueprint: of the model below the new head.
        ledger: that counts.
        training: of the stage.
        lora: adapters, if any.
        batch: of `rankings`.
        dropout: in front of every layer.
        bf16: whether passes are in bfloat16.
    """
    model = blueprint.classifier(quantised=lora.quantise == "4bit")
    trained = _adapted(model, lora, task="SEQ_CLS")
    if dropout > 0:
        add_dropout(model, probability=dropout)
    if blueprint.packs:
        prefer_fast_attention(trained, bf16=bf16)
    stage = Stage(ledger, [trained])

    def loss() -> Tensor:
        scores = ranking_scores(trained, batch, unwrapped=trained)
        pairs = {"better": batch["better"], "worse": batch["worse"], "targets": batch["labels"]}
        return comparison_loss(scores, **pairs)

    with ledger:
        _rehearse_training(stage, trained, loss, training=training, bf16=bf16)
    return stage.seen()


def rankings(
    *, rows: int, texts: int, prompt: int, length: int, packed: bool
) -> dict[str, Any]:
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
    return RankingCollator(pad_id=PAD, packed=packed)([row] * rows)


def _adapted(model: Any, lora: LoRA, *, task: str) -> Any:
    with torch.device("meta"):
        trained = with_adapter(model, lora, task=task, seed=0)
    return hollow(trained)


def _rehearse_training(
    stage: Stage, model: Any, loss: Callable[[], Tensor], *, training: Training, bf16: bool
) -> None:
    """Notes a step and a pass, on gradients that are there already where passes add up to a step."""
    optimizer = build_optimizer(model, training)
    stage.settle([optimizer])
    if training.minibatch_size == training.microbatch_size:
        optimizer.zero_grad()

    def one_pass() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = loss()
        total.backward()

    model.train()
    stage.observe("pass", one_pass)
    optimizer.zero_grad()
    model.eval()


def rehearse_generation(
    blueprint: Blueprint, ledger: Ledger, replies: Replies, *, precision: str = "fp32"
) -> Rehearsal:
    """Returns what a causal LM takes to reply: reading the prompts, and the last token's step."""
    model = blueprint.reader(blueprint.causal_lm())
    stage = Stage(ledger, [model])
    with ledger:
        _rehearse_replies(stage, model, replies, precision=precision)
    return stage.seen()


def _rehearse_replies(stage: Stage, policy: Any, replies: Replies, *, precision: str) -> None:
    with precision_context(precision, CPU):
        numbers = torch.zeros(replies.rows, 1)
        settings = {"uniforms": numbers, "eos_id": EOS, "pad_id": PAD, "batch_size": replies.rows}
        stage.observe("prefill", lambda: generate(policy, replies.prompts, **settings))
        for name, length in (("first token", 2), ("last token", replies.response)):
            token = _next_token(policy, replies, seen=replies.prompt + length - 1)
            stage.observe(name, token)
            del token


@torch.no_grad()
def _next_token(policy: Any, replies: Replies, *, seen: int) -> Callable[[], Any]:
    """Returns the step of a decoding whose cache has room for all and holds what was seen."""
    rows, total = replies.rows, replies.prompt + replies.response
    ids, mask = torch.full((rows, 1), WORD), torch.ones(rows, seen, dtype=torch.long)
    cache = policy(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    make_room(cache, positions=total - 1)
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
    rows: int,
) -> Rehearsal:
    """Returns what an update of ppo does: it replies, measures, scores, and optimises.

    Args:
        blueprint: of all four models.
        ledger: that counts.
        settings: of the trainer; those of one microbatch or two.
        roles: separate, trunk or lora.
        loras: the policy's adapter and the reward model's.
        replies: of one worker's batch.
        rows: of a pass.
    """
    lora, reward_lora = loras
    critic = settings.advantage.needs_value_model
    four = roles_of(blueprint, roles=roles, lora=lora, reward_lora=reward_lora, critic=critic)
    held = [role for role in (four.policy, four.reference, four.reward_model, four.value) if role]
    stage = Stage(ledger, held)
    trainer = PPOTrainer(
        four, [[WORD]], settings=settings, accelerator=None, eos_id=EOS, pad_id=PAD
    )
    prompts = [[WORD] * replies.prompt] * rows
    responses = [[WORD] * replies.response] * rows
    unknown = [torch.zeros(replies.response)] * rows
    figures = {"logprobs": unknown, "entropy": unknown}
    with ledger:
        stage.settle(list(trainer.optimiser.optimizers.values()))
        for optimizer in trainer.optimiser.optimizers.values():
            optimizer.zero_grad()
        _rehearse_replies(stage, four.policy, replies, precision=settings.precision)
        stage.observe(
            "measure", lambda: trainer.measure(prompts, Sampled(responses, figures))
        )
        experience = trainer.measure(prompts, Sampled(responses, figures))
        zeros = torch.zeros(experience.mask.shape)
        lesson = Lesson(experience, zeros, zeros if critic else None, 0.0)
        stage.observe("optimise", lambda: trainer.optimiser.run(0, lesson))
        text = torch.full((rows, replies.prompt + replies.response), WORD)
        stage.observe("text", lambda: trainer.text_perplexity(text))
    return stage.seen()
