"""The optimisation of one update: epochs over a rollout, one optimizer step a minibatch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import distributed
from pipeline.ppo.checks import FIRST_KL_TOLERANCE, check_norms, check_step
from pipeline.ppo.experience import Experience, Roles, length_mask, state_values
from pipeline.ppo.losses import Loss, entropy_loss, kl_loss, policy_loss, text_loss, value_loss
from pipeline.ppo.metrics import named_sums, step_metrics
from pipeline.ppo.order import permutation, rows_in_turn
from pipeline.ppo.settings import Settings
from pipeline.sequences import (
    Batch,
    chosen_logprobs,
    collate,
    next_logprobs,
    pad_tokens,
    response_states,
    token_entropy,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

ADAM_EPSILON = 1e-5
"""Epsilon of AdamW in the original implementation (Huang et al. 2024)."""


@dataclass(frozen=True)
class Lesson:
    """What an update learns from.

    Attributes:
        experience: the rollout.
        advantages: one per token, 0 outside the mask.
        returns: targets of the value model, 0 outside the mask; None when there is no such model.
        kl_coef: beta, where the penalty stands in the loss.
    """

    experience: Experience
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"] | None
    kl_coef: float


@dataclass(frozen=True)
class _Microbatch:
    """Rows of a lesson on the device, cut to their longest response."""

    batch: Batch
    mask: Bool[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"] | None
    kl_coef: float


class Optimiser:
    """Moves the policy and, where there is one, the value model; the same on every process.

    Attributes:
        models: what is trained, by role.
        moving: the roles that move in this update: all, or in a warm-up the critic alone.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        settings: Settings,
        accelerator: "Accelerator",
        pad_id: int,
        text: Int[Tensor, "row time"] | None = None,
    ) -> None:
        rates = settings.optimisation
        assert (text is not None) == (rates.ptx_coef > 0)
        self.text = text
        self.settings, self.accelerator, self.pad_id = settings, accelerator, pad_id
        self.roles, self.models = roles, {"policy": roles.policy}
        if roles.value is not None:
            self.models["value"] = roles.value
        self.moving = list(self.models)
        self.rates = {"policy": rates.learning_rate, "value": rates.value_learning_rate}
        self.optimizers = {
            name: _adamw(model, self.rates[name]) for name, model in self.models.items()
        }

    def run(self, number: int, lesson: Lesson) -> dict[str, float]:
        """Returns mean metrics over the steps of one update.

        Args:
            number: which update, from 0; learning rates and orders of rows follow from it.
            lesson: what is learned from.

        Raises:
            UserError: a run-time check failed; no optimizer moved after the failure.
        """
        warming = number < self.settings.optimisation.critic_warmup
        self.moving = ["value"] if warming else list(self.models)
        left = 1.0 - number / self.settings.updates
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * left
        steps: list[dict[str, float]] = []
        for rows in self._minibatches(number, size=len(lesson.experience.prompts)):
            text_rows = self._text_rows(number, step=len(steps))
            step = self._step(lesson, rows=rows, text_rows=text_rows, first=not steps)
            if step is None:
                break
            steps.append(step)
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        if self.settings.optimisation.target_kl is not None:
            means["optim/steps"] = float(len(steps))
        means["policy/first_approx_kl"] = steps[0]["policy/approx_kl"]
        return {**means, "optim/lr": self.rates["policy"] * left}

    def _minibatches(self, number: int, *, size: int) -> Iterator[Int[Tensor, " minibatch"]]:
        """Yields the rows of every minibatch, each epoch in a new order."""
        for epoch in range(self.settings.optimisation.epochs):
            order = permutation(self.settings.seed, "minibatches", number, epoch, size=size)
            yield from torch.from_numpy(order).split(self.settings.minibatch_size)

    def _text_rows(self, number: int, *, step: int) -> Int[Tensor, " text_row"]:
        """Returns the pretraining rows of a step, none without PPO-ptx."""
        if self.text is None:
            return torch.zeros(0, dtype=torch.long)
        settings, size = self.settings, self.settings.minibatch_size
        steps = settings.optimisation.epochs * (settings.prompts_per_update // size)
        start = (number * steps + step) * size
        rows = rows_in_turn(settings.seed, "ptx", start=start, size=size, total=len(self.text))
        return torch.tensor(rows)

    def _step(
        self,
        lesson: Lesson,
        *,
        rows: Int[Tensor, " minibatch"],
        text_rows: Int[Tensor, " text_row"],
        first: bool,
    ) -> dict[str, float] | None:
        """Returns the metrics of one optimizer step on a minibatch; None when it went too far."""
        experience = lesson.experience
        num_tokens = int(experience.mask[rows].sum())
        mine = rows[distributed.rank() :: distributed.world_size()]
        mine = mine[experience.lengths[mine].argsort(stable=True)]  # micro-batches pad little
        parts = [
            self._backward(self._microbatch(lesson, micro), num_tokens=num_tokens)
            for micro in mine.split(self.settings.microbatch_size)
            if len(micro)
        ]
        parts += self._backward_text(text_rows)
        shares = distributed.gather_objects(parts)
        metrics = step_metrics([part for share in shares for part in share], num_tokens=num_tokens)
        check_step(
            metrics,
            rows=rows,
            first_tolerance=FIRST_KL_TOLERANCE[self.settings.precision] if first else None,
            max_ratio=self.settings.optimisation.max_ratio,
        )
        target_kl = self.settings.optimisation.target_kl
        if target_kl is not None and metrics["policy/approx_kl"] > target_kl:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            return None
        norms = {name: self._reduced_norm(name) for name in self.moving}
        check_norms(norms, rows=rows)
        for name in self.moving:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return {**metrics, **{f"{name}/grad_norm": norm for name, norm in norms.items()}}

    def _microbatch(self, lesson: Lesson, rows: Int[Tensor, " microbatch"]) -> _Microbatch:
        experience, device = lesson.experience, self.models["policy"].device
        prompts = [experience.prompts[row] for row in rows]
        responses = [experience.responses[row] for row in rows]
        mask = length_mask(responses)

        def rows_of(values: Tensor) -> Tensor:
            return values[rows, : mask.shape[1]].to(device)

        return _Microbatch(
            batch=collate(prompts, responses, pad_id=self.pad_id).to(device),
            mask=mask.to(device),
            logprobs=rows_of(experience.logprobs),
            ref_logprobs=rows_of(experience.ref_logprobs),
            advantages=rows_of(lesson.advantages),
            values=rows_of(experience.values),
            returns=None if lesson.returns is None else rows_of(lesson.returns),
            kl_coef=lesson.kl_coef,
        )

    def _backward(self, micro: _Microbatch, *, num_tokens: int) -> dict[str, float]:
        """Returns sums over a micro-batch after adding its gradients to what moves."""
        rates = self.settings.optimisation
        coefs = {
            "policy": 1.0,
            "value": rates.value_coef,
            "kl": micro.kl_coef,
            "entropy": rates.entropy_coef,
        }
        sums: dict[str, float] = {}
        for losses in self._passes(micro, num_tokens=num_tokens):
            weighed = (coefs[name] * loss.value for name, loss in losses.items())
            total = sum(weighed, torch.zeros(()))
            if total.requires_grad:
                total.backward()
            sums |= named_sums(losses)
        return sums

    def _passes(self, micro: _Microbatch, *, num_tokens: int) -> Iterator[dict[str, Loss]]:
        """Yields the losses of each forward pass: the policy's and the critic's.

        The critic's begins after the policy's has gone backward, for roles on one base switch its
        adapters; on one trunk both are one pass.
        """
        with torch.set_grad_enabled("policy" in self.moving):
            with self._precision():
                states = response_states(self.roles.policy, micro.batch)
            losses = self._policy_losses(states, micro, num_tokens=num_tokens)
        if not self.roles.one_trunk:
            yield losses
            losses = {}
        if micro.returns is not None:
            with self._precision():
                states = self.roles.value_states(micro.batch, states)
                values = state_values(self.roles.value, states)
            losses["value"] = value_loss(
                pad_tokens(values, micro.mask),
                micro.values,
                micro.returns,
                micro.mask,
                clip=self.settings.optimisation.value_clip,
                num_tokens=num_tokens,
            )
            yield losses

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return precision_context(self.settings.precision, self.roles.policy.device)

    def _policy_losses(
        self, states: Float[Tensor, "token width"], micro: _Microbatch, *, num_tokens: int
    ) -> dict[str, Loss]:
        rates, estimator = self.settings.optimisation, self.settings.kl.in_loss
        with self._precision():
            logprobs = next_logprobs(
                self.roles.policy, states, temperature=self.settings.temperature
            )
        chosen = pad_tokens(chosen_logprobs(logprobs, micro.batch), micro.mask)
        losses = {
            "policy": policy_loss(
                chosen,
                micro.logprobs,
                micro.advantages,
                micro.mask,
                clip=rates.clip,
                clip_high=rates.clip_high,
                dual_clip=rates.dual_clip,
                num_tokens=num_tokens,
            )
        }
        if estimator is not None:
            losses["kl"] = kl_loss(
                chosen,
                micro.logprobs,
                micro.ref_logprobs,
                micro.mask,
                estimator=estimator,
                num_tokens=num_tokens,
            )
        if rates.entropy_coef > 0:
            entropy = pad_tokens(token_entropy(logprobs), micro.mask)
            losses["entropy"] = entropy_loss(entropy, micro.mask, num_tokens=num_tokens)
        return losses

    def _backward_text(self, rows: Int[Tensor, " text_row"]) -> list[dict[str, float]]:
        """Returns a loss for each micro-batch of text after adding the policy's gradients."""
        if self.text is None:
            return []
        policy, rates = self.models["policy"], self.settings.optimisation
        num_tokens = len(rows) * (self.text.shape[1] - 1)
        parts: list[dict[str, float]] = []
        mine = rows[distributed.rank() :: distributed.world_size()]
        for micro in mine.split(self.settings.microbatch_size):
            ids = self.text[micro].to(policy.device)
            with torch.set_grad_enabled("policy" in self.moving), self._precision():
                logits = policy(input_ids=ids, use_cache=False).logits
                loss = text_loss(logits, ids, num_tokens=num_tokens)
            if "policy" in self.moving:
                (rates.ptx_coef * loss.value).backward()
            parts.append(named_sums({"ptx": loss}))
        return parts

    def _reduced_norm(self, name: str) -> float:
        """Returns a model's gradient norm before clipping, gradients summed over all processes."""
        parameters = [p for p in self.models[name].parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:  # this process had no row of the minibatch
                parameter.grad = torch.zeros_like(parameter)
        if distributed.world_size() > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            flat = self.accelerator.reduce(flat, reduction="sum")
            for parameter, part in zip(
                parameters, flat.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad.copy_(part.view_as(parameter))
        limit = self.settings.optimisation.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def state(self) -> dict[str, Any]:
        """Returns what a resume point must keep beside the models."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up the state of a resume point."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def precision_context(
    precision: str, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Returns the context of a forward pass: autocast for bf16, nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _adamw(model: Any, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, eps=ADAM_EPSILON, weight_decay=0.0
    )
