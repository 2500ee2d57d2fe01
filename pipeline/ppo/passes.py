"""Forward and backward passes over micro-batches, by workers that share weights."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.parallel import side_by_side
from pipeline.ppo.experience import Experience, Roles, length_mask, state_values
from pipeline.ppo.losses import Loss, entropy_loss, kl_loss, policy_loss, text_loss, value_loss
from pipeline.ppo.metrics import named_sums
from pipeline.ppo.settings import Settings
from pipeline.sequences import (
    Batch,
    collate,
    pad_tokens,
    response_states,
    response_tokens,
    text_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from pipeline.sharding import in_one_pass


@dataclass(frozen=True)
class Lesson:
    """What an update learns from.

    Attributes:
        experience: the rollout.
        advantages: one per token, 0 outside the mask.
        returns: targets of the value model, 0 outside the mask; None when there is no such model.
        kl_coef: beta, where the penalty stands in the loss.
        weights: of each token, where an engine sampled that is not quite the policy
            (`pipeline.ppo.correction`); None for 1.
    """

    experience: Experience
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"] | None
    kl_coef: float
    weights: Float[Tensor, "batch time"] | None = None


@dataclass(frozen=True)
class Microbatch:
    """Rows of a lesson on the device, cut to their longest response."""

    batch: Batch
    mask: Bool[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"] | None
    kl_coef: float
    weights: Float[Tensor, "batch time"] | None

    @property
    def is_packed(self) -> bool:
        """Whether its rows stand end to end."""
        return bool(self.batch.row_lengths)

    @classmethod
    def of(
        cls, lesson: Lesson, rows: Int[Tensor, " microbatch"], *, roles: Roles, pad_id: int
    ) -> "Microbatch":
        """Returns some rows of a lesson, as the roles read them."""
        device = roles.policy.device
        experience = lesson.experience
        prompts = [experience.prompts[row] for row in rows]
        responses = [experience.responses[row] for row in rows]
        mask = length_mask(responses)

        def rows_of(values: Tensor) -> Tensor:
            return values[rows, : mask.shape[1]].to(device)

        return cls(
            batch=collate(prompts, responses, pad_id=pad_id, packed=roles.packed).to(device),
            mask=mask.to(device),
            logprobs=rows_of(experience.logprobs),
            ref_logprobs=rows_of(experience.ref_logprobs),
            advantages=rows_of(lesson.advantages),
            values=rows_of(experience.values),
            returns=None if lesson.returns is None else rows_of(lesson.returns),
            kl_coef=lesson.kl_coef,
            weights=None if lesson.weights is None else rows_of(lesson.weights),
        )


@dataclass(frozen=True)
class Job:
    """One pass forward and backward.

    Attributes:
        kind: policy, value, trunk (both on one trunk) or text (PPO-ptx).
        rows: what is read; for text its token ids.
        num_tokens: tokens of the whole minibatch, by which the losses are divided.
        moving: the roles whose gradients are wanted.
        counts: whether it is one of the minibatch's; otherwise it stands in where this process has
            fewer than others, its gradients are zeros and its figures are left out.
    """

    kind: str
    rows: Microbatch | Int[Tensor, "row time"]
    num_tokens: int
    moving: Sequence[str]
    counts: bool = True

    @property
    def size(self) -> int:
        """Positions that are read."""
        return (self.rows if isinstance(self.rows, Tensor) else self.rows.batch.input_ids).numel()


class Crew:
    """Workers that divide the passes of a step, each on the same weights with gradients of its own.

    So what the gradients sum to does not depend on which pass ends first.
    """

    def __init__(self, roles: Roles, settings: Settings) -> None:
        self.workers = [Worker(roles, settings)]
        for _ in range(1, settings.workers):
            self.workers.append(Worker(on_same_weights(roles), settings))

    def backward(self, jobs: Sequence[Job]) -> list[dict[str, float]]:
        """Returns the sums of the passes after adding their gradients to those of the roles."""
        shares = divided(jobs, shares=len(self.workers))
        work = [
            (worker, share) for worker, share in zip(self.workers, shares, strict=True) if share
        ]
        found = side_by_side(
            lambda mine: [mine[0].backward(job) for job in mine[1]], work, workers=len(work)
        )
        sums = [part for share in found for part in share]
        for worker in self.workers[1:]:
            pairs = zip(self.workers[0].parameters(), worker.parameters(), strict=True)
            for ours, theirs in pairs:
                if theirs.grad is not None:
                    ours.grad = theirs.grad if ours.grad is None else ours.grad.add_(theirs.grad)
                    theirs.grad = None
        return sums


def divided(jobs: Sequence[Job], *, shares: int) -> list[list[Job]]:
    """Returns shares of like size, each in the order given.

    The largest job is dealt first, each to the share that is smallest so far.
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for index in sorted(range(len(jobs)), key=lambda index: -jobs[index].size):
        share = sizes.index(min(sizes))
        dealt[share].append(index)
        sizes[share] += jobs[index].size
    return [[jobs[index] for index in sorted(share)] for share in dealt]


def on_same_weights(roles: Roles) -> Roles:
    """Returns roles that read the weights of these; gradients, and which adapter is on, are theirs.

    What is frozen is the same tensor, what is trained another parameter of the same memory.
    """
    seen: dict[int, Any] = {}
    for role in filter(None, (roles.policy, roles.value)):
        for module in role.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                trained = tensor.requires_grad
                seen[id(tensor)] = nn.Parameter(tensor.detach()) if trained else tensor
    policy, value = copy.deepcopy((roles.policy, roles.value), seen)
    return replace(roles, policy=policy, value=value)


class Worker:
    """Goes forward and backward through the roles, a job at a time."""

    def __init__(self, roles: Roles, settings: Settings) -> None:
        self.roles, self.settings = roles, settings

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields what is trained, always in the same order."""
        for role in filter(None, (self.roles.policy, self.roles.value)):
            yield from (parameter for parameter in role.parameters() if parameter.requires_grad)

    def backward(self, job: Job) -> dict[str, float]:
        """Returns the sums of one pass after adding its gradients to what moves."""
        assert isinstance(job.rows, Tensor) or job.rows.is_packed == self.roles.packed
        role = self.roles.value if job.kind == "value" else self.roles.policy
        total, sums = in_one_pass(role, self._forward, job)
        if total.requires_grad:
            (total if job.counts else 0.0 * total).backward()
        return sums if job.counts else {}

    def _forward(self, job: Job) -> tuple[Tensor, dict[str, float]]:
        """Returns the weighted loss of a pass, and its sums."""
        rates, micro = self.settings.optimisation, job.rows
        coefs = {"policy": 1.0, "value": rates.value_coef, "entropy": rates.entropy_coef}
        if isinstance(micro, Tensor):
            coefs, losses = {"ptx": rates.ptx_coef}, self._text(micro, job)
        else:
            coefs["kl"], losses = micro.kl_coef, self._losses(micro, job)
        weighed = (coefs[name] * loss.value for name, loss in losses.items())
        return sum(weighed, torch.zeros(())), named_sums(losses)

    def _losses(self, micro: Microbatch, job: Job) -> dict[str, Loss]:
        if job.kind == "value":
            states = self._states(self.roles.value, micro)
            return self._critic(states, micro, num_tokens=job.num_tokens)
        with torch.set_grad_enabled("policy" in job.moving):
            states = self._states(self.roles.policy, micro)
            losses = self._policy(states, micro, num_tokens=job.num_tokens)
        if job.kind == "trunk":
            losses |= self._critic(states, micro, num_tokens=job.num_tokens)
        return losses

    def _states(self, model: Any, micro: Microbatch) -> Float[Tensor, "token width"]:
        with self._precision():
            return response_states(model, micro.batch)

    def _critic(
        self, states: Float[Tensor, "token width"], micro: Microbatch, *, num_tokens: int
    ) -> dict[str, Loss]:
        assert micro.returns is not None
        with self._precision():
            values = state_values(self.roles.value, states)
        loss = value_loss(
            pad_tokens(values, micro.mask),
            micro.values,
            micro.returns,
            micro.mask,
            clip=self.settings.optimisation.value_clip,
            num_tokens=num_tokens,
        )
        return {"value": loss}

    def _policy(
        self, states: Float[Tensor, "token width"], micro: Microbatch, *, num_tokens: int
    ) -> dict[str, Loss]:
        rates, estimator = self.settings.optimisation, self.settings.kl.in_loss
        logprobs, entropy = self._figures(states, micro)
        chosen, advantages = pad_tokens(logprobs, micro.mask), micro.advantages
        if micro.weights is not None:  # the loss is proportional to a token's advantage
            advantages = advantages * micro.weights
        losses = {
            "policy": policy_loss(
                chosen,
                micro.logprobs,
                advantages,
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
                weights=micro.weights,
            )
        if entropy is not None:
            entropy = pad_tokens(entropy, micro.mask)
            losses["entropy"] = entropy_loss(entropy, micro.mask, num_tokens=num_tokens)
        return losses

    def _figures(
        self, states: Float[Tensor, "token width"], micro: Microbatch
    ) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"] | None]:
        """Returns log-probabilities of the response tokens, and entropies where they are paid."""
        policy, tokens = self.roles.policy, response_tokens(micro.batch)
        temperature = self.settings.temperature
        with self._precision():
            if self.settings.optimisation.entropy_coef > 0:
                return token_logprobs_and_entropy(policy, states, tokens, temperature=temperature)
            return token_logprobs(policy, states, tokens, temperature=temperature), None

    def _text(self, ids: Int[Tensor, "row time"], job: Job) -> dict[str, Loss]:
        with torch.set_grad_enabled("policy" in job.moving), self._precision():
            logprobs = text_logprobs(self.roles.policy, ids)
            return {"ptx": text_loss(logprobs, num_tokens=job.num_tokens)}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return precision_context(self.settings.precision, self.roles.policy.device)


def precision_context(
    precision: str, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Returns the context of a forward pass: autocast for bf16, nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
