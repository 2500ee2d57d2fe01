"""The optimisation of one update: epochs over a rollout, one optimizer step a minibatch."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from pipeline import distributed
from pipeline.ppo.checks import FIRST_KL_TOLERANCE, check_norms, check_step
from pipeline.ppo.compiled import CompiledCrew
from pipeline.ppo.experience import Roles
from pipeline.ppo.metrics import step_metrics
from pipeline.ppo.order import permutation, rows_in_turn
from pipeline.ppo.passes import Crew, Job, Lesson, Microbatch
from pipeline.ppo.settings import Settings
from pipeline.sharding import Sharded, load_whole_state, whole_state, whole_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

ADAM_EPSILON = 1e-5
"""Epsilon of AdamW in the original implementation (Huang et al. 2024)."""


class Optimiser:
    """Moves the policy and, where there is one, the value model; the same on every process.

    Attributes:
        models: what is trained, by role.
        moving: the roles that move in this update: all, or in a warm-up the critic alone.
        kinds: the passes that a micro-batch needs.
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
        self.kinds = ["trunk"] if roles.one_trunk else list(self.models)
        self.crew = (CompiledCrew if rates.compile else Crew)(roles, settings)
        self.rates = {"policy": rates.learning_rate, "value": rates.value_learning_rate}
        self.optimizers = {
            name: _adamw(model, self.rates[name]) for name, model in self.models.items()
        }

    def run(
        self,
        number: int,
        lesson: Lesson,
        *,
        steps: list[dict[str, float]],
        goes_on: Callable[[], bool],
    ) -> dict[str, float] | None:
        """Returns mean metrics over the steps of one update; None where it was told not to go on.

        Args:
            number: which update, from 0; learning rates and orders of rows follow from it.
            lesson: what is learned from.
            steps: metrics of the steps that were taken already; those taken now are added.
            goes_on: asked before every step, with the same answer on every process.

        Raises:
            UserError: a run-time check failed; no optimizer moved after the failure.
        """
        warming = number < self.settings.optimisation.critic_warmup
        self.moving = ["value"] if warming else list(self.models)
        left = 1.0 - number / self.settings.updates
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * left
        minibatches = self._minibatches(number, size=len(lesson.experience.prompts))
        for rows in itertools.islice(minibatches, len(steps), None):
            if not goes_on():
                return None
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
        start = (number * settings.steps_per_update + step) * size
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
        """Returns the metrics of one optimizer step on a minibatch; None when it went too far.

        The first step of an update is always taken: its KL is 0 but for rounding.
        """
        experience = lesson.experience
        num_tokens = int(experience.mask[rows].sum())
        jobs = self._jobs(lesson, rows=rows, text_rows=text_rows, num_tokens=num_tokens)
        parts = self.crew.backward(jobs)
        shares = distributed.gather_objects(parts)
        metrics = step_metrics([part for share in shares for part in share], num_tokens=num_tokens)
        check_step(
            metrics,
            rows=rows,
            first_tolerance=FIRST_KL_TOLERANCE[self.settings.precision] if first else None,
            max_ratio=self.settings.optimisation.max_ratio,
        )
        target_kl = self.settings.optimisation.target_kl
        if not first and target_kl is not None and metrics["policy/approx_kl"] > target_kl:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            return None
        norms = {name: self._reduced_norm(name) for name in self.moving}
        check_norms(norms, rows=rows)
        for name in self.moving:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return {**metrics, **{f"{name}/grad_norm": norm for name, norm in norms.items()}}

    def _jobs(
        self,
        lesson: Lesson,
        *,
        rows: Int[Tensor, " minibatch"],
        text_rows: Int[Tensor, " text_row"],
        num_tokens: int,
    ) -> list[Job]:
        """Returns the passes of this process over a minibatch, the policy's before the critic's."""
        by_length = rows[lesson.experience.lengths[rows].argsort(stable=True)]  # pads little
        micros = [
            (Microbatch.of(lesson, micro, roles=self.roles, pad_id=self.pad_id), counts)
            for micro, counts in self._microbatches(by_length)
        ]
        jobs = [
            Job(kind, micro, num_tokens, self.moving, counts)
            for kind in self.kinds
            for micro, counts in micros
        ]
        if self.text is not None:
            length = len(text_rows) * (self.text.shape[1] - 1)
            jobs += [
                Job("text", self.text[micro].to(self.roles.policy.device), length, self.moving, own)
                for micro, own in self._microbatches(text_rows)
            ]
        return jobs

    def _microbatches(
        self, rows: Int[Tensor, " row"]
    ) -> list[tuple[Int[Tensor, " microbatch"], bool]]:
        """Returns this process's micro-batches, as many as any process has, and whose they are.

        Where they come out short the first row stands in: one that is not this process's own.
        """
        size, ranks = self.settings.microbatch_size, distributed.world_size()
        mine = rows[distributed.rank() :: ranks]
        own = [(micro, True) for micro in mine.split(size) if len(micro)]
        most = math.ceil(math.ceil(len(rows) / ranks) / size)
        return own + [(rows[:1], False)] * (most - len(own))

    def _reduced_norm(self, name: str) -> float:
        """Returns a model's gradient norm before clipping, gradients summed over all processes."""
        parameters = [p for p in self.models[name].parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:  # this process had no row of the minibatch
                parameter.grad = torch.zeros_like(parameter)
        if distributed.world_size() > 1 and not isinstance(self.models[name], Sharded):
            flat = torch.cat([p.grad.flatten() for p in parameters])
            with distributed.together():
                flat = self.accelerator.reduce(flat, reduction="sum")
            for parameter, part in zip(
                parameters, flat.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad.copy_(part.view_as(parameter))
        limit = self.settings.optimisation.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(whole_tensor(norm, norm.device))

    def state(self) -> dict[str, Any]:
        """Returns what a resume point must keep beside the models, whole on the main process."""
        return {name: whole_state(optimizer) for name, optimizer in self.optimizers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up the state of a resume point."""
        for name, optimizer in self.optimizers.items():
            load_whole_state(optimizer, state[name])


def _adamw(model: Any, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, eps=ADAM_EPSILON, weight_decay=0.0
    )
