"""PPO with a KL penalty: `update` reads as the algorithm.

Every process holds the rows of all processes (token ids and a few floats each), so whitening, KL
control and metrics are global by construction; generation, scoring and gradients are divided.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline import distributed
from pipeline.models import load_causal_lm, load_reward_model
from pipeline.ppo.advantages import gae, whiten
from pipeline.ppo.checks import RATIO_TOLERANCE, check_experience, check_norms, check_step
from pipeline.ppo.experience import Experience, Roles, assemble, length_mask, measure, token_values
from pipeline.ppo.kl import AdaptiveController, Controller, FixedController, compensated
from pipeline.ppo.losses import policy_loss, value_loss
from pipeline.ppo.metrics import explained_variance, named_sums, objective, step_metrics
from pipeline.ppo.rewards import final_scores, token_rewards
from pipeline.ppo.rollout import generate, stream, uniforms
from pipeline.ppo.settings import KL, Settings
from pipeline.sequences import collate, pad_tokens, response_logprobs

if TYPE_CHECKING:
    from accelerate import Accelerator

ADAM_EPSILON = 1e-5
"""Epsilon of AdamW in the original implementation (Huang et al. 2024)."""


@dataclass(frozen=True)
class Outcome:
    """What one update reports: metrics (reproducible), timings (clocks), and its rollout.

    Rewards and advantages are those that the losses were made of, 0 outside the mask.
    """

    metrics: dict[str, float]
    timings: dict[str, float]
    experience: Experience
    rewards: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]


class PPOTrainer:
    """Trains a policy and a value model on prompts; all randomness is a function of the seed."""

    def __init__(
        self,
        roles: Roles,
        prompts: Sequence[list[int]],
        *,
        settings: Settings,
        accelerator: "Accelerator",
        eos_id: int,
        pad_id: int,
    ) -> None:
        self.roles, self.prompts, self.settings = roles, prompts, settings
        self.accelerator, self.eos_id, self.pad_id = accelerator, eos_id, pad_id
        self.kl = build_controller(settings.kl)
        self.models = {"policy": roles.policy, "value": roles.value}
        rates = settings.optimisation
        self.optimizers = {
            "policy": _adamw(roles.policy, rates.learning_rate),
            "value": _adamw(roles.value, rates.value_learning_rate),
        }

    def update(self, number: int) -> Outcome:
        """Returns the outcome of one PPO update: sample, score, penalise, estimate, optimise.

        Args:
            number: which update, from 0; prompts, uniforms and permutations follow from it.

        Raises:
            UserError: a run-time check failed; no optimizer moved after the failure.
        """
        settings, timings = self.settings, dict[str, float]()
        prompts = [self.prompts[row] for row in self.prompt_rows(number)]
        with _clock(timings, "rollout"):
            responses = self.sample(prompts, update=number)
        with _clock(timings, "score"):
            experience = self.measure(prompts, responses)
        mask = experience.mask
        check_experience(experience, update=number, precision=settings.precision)

        scores = final_scores(
            experience.scores,
            experience.ended,
            missing_eos_score=settings.reward.missing_eos_score,
            clip=settings.reward.clip,
        )
        penalised = compensated(experience.kl, mask, share=settings.kl.length_compensation)
        rewards = token_rewards(scores, penalised, mask, kl_coef=self.kl.coef)
        if settings.reward.whiten:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(
            rewards, experience.values, mask, gamma=settings.reward.gamma, lam=settings.reward.lam
        )
        advantages = whiten(advantages, mask)
        with _clock(timings, "optimise"):
            losses = self.optimise(number, experience, advantages, returns)

        metrics = {
            **objective(experience, scores, kl_coef=self.kl.coef, clip=settings.reward.clip),
            **losses,
            "value/explained_variance": explained_variance(experience.values[mask], returns[mask]),
        }
        self.kl.update(metrics["objective/kl"], num_episodes=len(prompts))
        _add_throughput(timings, num_tokens=int(mask.sum()))
        return Outcome(metrics, timings, experience, rewards, advantages)

    def prompt_rows(self, number: int) -> list[int]:
        """Returns the prompts of an update: each once per epoch, in a new order every epoch."""
        size, total = self.settings.prompts_per_update, len(self.prompts)
        rows: list[int] = []
        while len(rows) < size:
            epoch, place = divmod(number * size + len(rows), total)
            order = _permutation(self.settings.seed, "prompts", epoch, size=total)
            rows += order[place : place + size - len(rows)].tolist()
        return rows

    def sample(
        self, prompts: Sequence[list[int]], *, update: int, name: str = "rollout"
    ) -> list[list[int]]:
        """Returns one response per prompt; each process generates its share.

        Args:
            prompts: token ids, the same list on every process.
            update: enters the uniform numbers.
            name: random stream, so that validation and rollout never share numbers.
        """
        mine = range(distributed.rank(), len(prompts), distributed.world_size())
        numbers = uniforms(
            stream(self.settings.seed, name),
            update=update,
            rows=mine,
            positions=self.settings.max_response_tokens,
        )
        with self._precision():
            responses = generate(
                self.roles.policy,
                [prompts[row] for row in mine],
                uniforms=numbers,
                temperature=self.settings.temperature,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
            )
        return _interleave(distributed.gather_objects(responses))

    def measure(self, prompts: list[list[int]], responses: list[list[int]]) -> Experience:
        """Returns the rows with log-probabilities, values and scores of all roles."""
        share = slice(distributed.rank(), None, distributed.world_size())
        with self._precision():
            measured = measure(
                self.roles,
                prompts[share],
                responses[share],
                temperature=self.settings.temperature,
                pad_id=self.pad_id,
                batch_size=self.settings.minibatch_size,
            )
        shares = distributed.gather_objects(measured)
        together = {name: _interleave([part[name] for part in shares]) for name in measured}
        return assemble(prompts, responses, together, eos_id=self.eos_id)

    def optimise(
        self,
        number: int,
        experience: Experience,
        advantages: Float[Tensor, "batch time"],
        returns: Float[Tensor, "batch time"],
    ) -> dict[str, float]:
        """Returns mean metrics after the epochs over a rollout, one optimizer step a minibatch."""
        rates = self.settings.optimisation
        left = 1.0 - number / self.settings.updates
        for name, rate in (("policy", rates.learning_rate), ("value", rates.value_learning_rate)):
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate * left
        size, steps = len(experience.prompts), list[dict[str, float]]()
        for epoch in range(rates.epochs):
            order = _permutation(self.settings.seed, "minibatches", number, epoch, size=size)
            for rows in torch.from_numpy(order).split(self.settings.minibatch_size):
                first = epoch == 0 and not steps
                steps.append(self._step(experience, advantages, returns, rows=rows, first=first))
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        return {
            **means,
            "policy/first_approx_kl": steps[0]["policy/approx_kl"],
            "optim/lr": rates.learning_rate * left,
        }

    def _step(
        self,
        experience: Experience,
        advantages: Float[Tensor, "batch time"],
        returns: Float[Tensor, "batch time"],
        *,
        rows: Int[Tensor, "minibatch"],
        first: bool,
    ) -> dict[str, float]:
        """Returns the metrics of one optimizer step of both models on a minibatch."""
        num_tokens = int(experience.mask[rows].sum())
        mine = rows[distributed.rank() :: distributed.world_size()]
        mine = mine[experience.lengths[mine].argsort(stable=True)]  # micro-batches pad little
        parts = [
            self._backward(experience, advantages, returns, rows=micro, num_tokens=num_tokens)
            for micro in mine.split(self.settings.microbatch_size)
            if len(micro)
        ]
        shares = distributed.gather_objects(parts)
        metrics = step_metrics([part for share in shares for part in share], num_tokens=num_tokens)
        check_step(
            metrics,
            rows=rows,
            first_tolerance=RATIO_TOLERANCE[self.settings.precision] if first else None,
            max_ratio=self.settings.optimisation.max_ratio,
        )
        norms = {name: self._reduced_norm(name) for name in self.models}
        check_norms(norms, rows=rows)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return {**metrics, **{f"{name}/grad_norm": norm for name, norm in norms.items()}}

    def _backward(
        self,
        experience: Experience,
        advantages: Float[Tensor, "batch time"],
        returns: Float[Tensor, "batch time"],
        *,
        rows: Int[Tensor, " microbatch"],
        num_tokens: int,
    ) -> dict[str, float]:
        """Returns sums over a micro-batch after adding its gradients to both models."""
        rates, device = self.settings.optimisation, self.roles.policy.device
        prompts = [experience.prompts[row] for row in rows]
        responses = [experience.responses[row] for row in rows]
        batch = collate(prompts, responses, pad_id=self.pad_id).to(device)
        mask = length_mask(responses).to(device)
        width = mask.shape[1]

        def rows_of(values: Tensor) -> Tensor:
            return values[rows, :width].to(device)

        with self._precision():
            logprobs = response_logprobs(
                self.roles.policy, batch, temperature=self.settings.temperature
            )
            values = token_values(self.roles.value, batch)
        policy = policy_loss(
            pad_tokens(logprobs[batch.response_mask], mask),
            rows_of(experience.logprobs),
            rows_of(advantages),
            mask,
            clip=rates.clip,
            num_tokens=num_tokens,
        )
        value = value_loss(
            pad_tokens(values, mask),
            rows_of(experience.values),
            rows_of(returns),
            mask,
            clip=rates.value_clip,
            num_tokens=num_tokens,
        )
        (policy.value + rates.value_coef * value.value).backward()
        return {**named_sums("policy", policy), **named_sums("value", value)}

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

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.roles.policy.device.type, torch.bfloat16)

    def save(self, folder: Path) -> None:
        """Writes the state of a resume point; the main process's is everyone's."""
        if not distributed.is_main():
            return
        for name, model in self.models.items():
            model.save_pretrained(folder / name)
        state = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        torch.save({**state, "kl": self.kl.state()}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        """Takes up the state of a resume point."""
        self.roles.policy.load_state_dict(load_causal_lm(folder / "policy").state_dict())
        self.roles.value.load_state_dict(load_reward_model(folder / "value").state_dict())
        state = torch.load(folder / "state.pt", weights_only=True)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        self.kl.coef = state["kl"]["coef"]


def build_controller(kl: KL) -> Controller:
    """Returns the configured controller of the KL coefficient."""
    if kl.controller == "fixed":
        return FixedController(kl.coef)
    return AdaptiveController(kl.coef, target=kl.target, horizon=kl.horizon)


def _adamw(model: Any, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, eps=ADAM_EPSILON, weight_decay=0.0
    )


def _permutation(seed: int, name: str, *numbers: int, size: int) -> Int[np.ndarray, " size"]:
    """Returns a permutation that is a function of the seed, the stream's name and the numbers."""
    sequence = np.random.SeedSequence([stream(seed, name), *numbers])
    return np.random.Generator(np.random.Philox(sequence)).permutation(size)


def _interleave(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns the rows of all processes in their first order, dealt out one by one."""
    rows: list[Any] = [None] * sum(len(share) for share in shares)
    for rank, share in enumerate(shares):
        rows[rank :: len(shares)] = share
    return rows


@contextlib.contextmanager
def _clock(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[f"time/{name}_seconds"] = time.perf_counter() - start


def _add_throughput(timings: dict[str, float], *, num_tokens: int) -> None:
    for name in ("rollout", "score", "optimise"):
        seconds = timings[f"time/{name}_seconds"]
        timings[f"throughput/{name}_tokens_per_second"] = num_tokens / seconds
