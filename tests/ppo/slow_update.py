"""One whole PPO update as the reference would make it: a forward pass per response, no padding.

Models and random numbers are the trainer's; everything between them is `tests.ppo.reference`, and
AdamW and gradient clipping as their papers write them.
"""

import copy
import math
from typing import Any

import torch

from pipeline.ppo.order import permutation
from pipeline.ppo.trainer import PPOTrainer
from tests.ppo import reference

BETAS, EPSILON = (0.9, 0.999), 1e-5


def logprobs_of(model: Any, prompt: list[int], response: list[int], temperature: float) -> list:
    """The log pi of each response token: the logits one position earlier, divided by T."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    before = len(prompt) - 1
    return [logits[before + i].log_softmax(-1)[token] for i, token in enumerate(response)]


def values_of(model: Any, prompt: list[int], response: list[int]) -> list:
    """The normalised head one position before each response token."""
    raw = _head(model, prompt + response)
    before = len(prompt) - 1
    return [_normalised(model, raw[before + i]) for i in range(len(response))]


@torch.no_grad()
def score_of(model: Any, prompt: list[int], response: list[int]) -> float:
    """The normalised head at the last token."""
    return float(_normalised(model, _head(model, prompt + response)[-1]))


def _head(model: Any, tokens: list[int]) -> torch.Tensor:
    hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return model.score(hidden)[:, 0]


def _normalised(model: Any, raw: torch.Tensor) -> torch.Tensor:
    return (raw - model.config.reward_mean) / model.config.reward_std


def numbers(rows: list[list]) -> reference.Rows:
    return [[float(token.detach()) for token in row] for row in rows]


class AdamW:
    """Loshchilov and Hutter 2019 without decay, one parameter after the other."""

    def __init__(self, model: Any) -> None:
        self.parameters = list(model.parameters())
        self.moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in self.parameters]
        self.steps = 0

    def step(self, *, rate: float, max_norm: float) -> float:
        """Clips, moves, forgets the gradients; returns their norm before clipping."""
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in self.parameters))
        scale = min(1.0, max_norm / (norm + 1e-6))  # torch's 1e-6
        self.steps += 1
        for parameter, moment in zip(self.parameters, self.moments, strict=True):
            gradient = parameter.grad * scale
            for index, power in ((0, gradient), (1, gradient**2)):
                moment[index] = BETAS[index] * moment[index] + (1 - BETAS[index]) * power
            mean, square = (
                m / (1 - beta**self.steps) for m, beta in zip(moment, BETAS, strict=True)
            )
            parameter.data -= rate * mean / (square.sqrt() + EPSILON)
            parameter.grad = None
        return norm


class SlowPPO:
    """The reference's own copies of everything that changes from update to update."""

    def __init__(self, ppo: PPOTrainer) -> None:
        self.settings, self.eos_id = ppo.settings, ppo.eos_id
        self.roles = copy.deepcopy(ppo.roles)
        self.models = {"policy": self.roles.policy, "value": self.roles.value}
        self.optimizers = {name: AdamW(model) for name, model in self.models.items()}
        self.coef = ppo.settings.kl.coef

    def update(
        self, number: int, prompts: list[list[int]], responses: list[list[int]]
    ) -> dict[str, float]:
        """Makes update `number` on a recorded rollout; returns the means over its steps."""
        settings, rows = self.settings, list(zip(prompts, responses, strict=True))
        with torch.no_grad():
            old, ref = (
                numbers([logprobs_of(model, *row, settings.temperature) for row in rows])
                for model in (self.roles.policy, self.roles.reference)
            )
            values = numbers([values_of(self.roles.value, *row) for row in rows])
        kl = reference.each(reference.k1, old, ref)
        share = settings.kl.length_compensation
        penalised = reference.compensated(kl, share=share) if share else kl
        rewards = reference.token_rewards(self.scores(rows), penalised, coef=self.coef)
        if settings.reward.whiten:
            rewards = reference.whiten(rewards, shift_mean=False)
        advantages = reference.advantages(
            rewards, values, gamma=settings.reward.gamma, lam=settings.reward.lam
        )
        returns = reference.each(lambda a, v: a + v, advantages, values)
        whitened = reference.whiten(advantages, shift_mean=True)
        steps = [
            self.step(number, [(rows[i], old[i], values[i], whitened[i], returns[i]) for i in part])
            for part in self.minibatches(number)
        ]
        self.adapt(sum(reference.flat(kl)) / len(rows), num_episodes=len(rows))
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    def scores(self, rows: list) -> list[float]:
        return [
            reference.final_score(
                score_of(self.roles.reward_model, prompt, response),
                ended=self.eos_id in response,
                missing_eos_score=self.settings.reward.missing_eos_score,
                clip=self.settings.reward.clip,
            )
            for prompt, response in rows
        ]

    def minibatches(self, number: int) -> list[list[int]]:
        """Rows of every step: the trainer's own permutations, cut one after the other."""
        settings, result = self.settings, []
        size, part = settings.prompts_per_update, settings.minibatch_size
        for epoch in range(settings.optimisation.epochs):
            order = permutation(settings.seed, "minibatches", number, epoch, size=size).tolist()
            result += [order[start : start + part] for start in range(0, size, part)]
        return result

    def step(self, number: int, minibatch: list) -> dict[str, float]:
        """One step of both models, each on the gradient that the reference gives per token."""
        rates = self.settings.optimisation
        rows, old, old_values, advantages, returns = zip(*minibatch, strict=True)
        num_tokens = sum(map(len, old))
        new = [logprobs_of(self.roles.policy, *row, self.settings.temperature) for row in rows]
        policy = reference.policy_loss(
            numbers(new), old, advantages, clip=rates.clip, num_tokens=num_tokens
        )
        sum(reference.flat(reference.each(lambda x, g: x * g, new, policy.gradient))).backward()
        new = [values_of(self.roles.value, *row) for row in rows]
        value = reference.value_loss(
            numbers(new), old_values, returns, clip=rates.value_clip, num_tokens=num_tokens
        )
        together = sum(reference.flat(reference.each(lambda x, g: x * g, new, value.gradient)))
        (rates.value_coef * together).backward()
        left = 1.0 - number / self.settings.updates
        norms = {
            f"{name}/grad_norm": self.optimizers[name].step(
                rate=rate * left, max_norm=rates.max_grad_norm
            )
            for name, rate in (
                ("policy", rates.learning_rate), ("value", rates.value_learning_rate)
            )
        }  # fmt: skip
        return {"policy/loss": policy.value, "value/loss": value.value, **norms}

    def adapt(self, kl: float, *, num_episodes: int) -> None:
        penalty = self.settings.kl
        if penalty.controller == "adaptive":
            self.coef = reference.adapted(
                self.coef, kl, target=penalty.target, horizon=penalty.horizon,
                num_episodes=num_episodes,
            )  # fmt: skip
