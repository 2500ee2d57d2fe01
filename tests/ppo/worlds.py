"""Small worlds for the PPO trainer: tiny models, and rewards one can predict."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.ppo.experience import Roles
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.ppo.trainer import PPOTrainer
from tests.support import tiny_llama, tiny_reward_model

EOS, PAD, TARGET = 1, 0, 5
PROMPTS = [[2 + row % 9, *range(3, 3 + row % 4)] for row in range(20)]


class TokenCounter(torch.nn.Module):
    """A reward model whose score is the share of TARGET among all tokens of the row."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(reward_mean=0.0, reward_std=0.1)
        self.score = torch.nn.Identity()

    def base_model(self, *, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        hits = (input_ids == TARGET).cumsum(dim=1)
        share = hits / torch.arange(1, input_ids.shape[1] + 1)
        return SimpleNamespace(last_hidden_state=share[:, :, None])


def settings(**changes: Any) -> Settings:
    """Small settings; keyword arguments replace fields, also of the groups."""
    groups = {
        "kl": KL(coef=0.1, controller="fixed"),
        "reward": Reward(),
        "advantage": Advantage(),
        "optimisation": Optimisation(
            learning_rate=3e-3, value_learning_rate=3e-3, epochs=2, max_grad_norm=10.0
        ),
    }
    fields: dict[str, Any] = {
        "seed": 1,
        "updates": 4,
        "prompts_per_update": 12,
        "minibatch_size": 6,
        "microbatch_size": 6,
        "max_response_tokens": 8,
        "temperature": 1.0,
        "precision": "fp32",
    }
    return Settings(**{**fields, **groups, **changes})


def trainer(
    *,
    double: bool = False,
    reward_model: Any = None,
    text: torch.Tensor | None = None,
    **changes: Any,
) -> PPOTrainer:
    """A trainer of tiny models; the policy starts as a copy of the reference."""
    chosen = settings(**changes)
    reference, reward = tiny_llama(), tiny_reward_model()
    if double:
        reference, reward = reference.double(), reward.double()
    value = copy.deepcopy(reward) if chosen.advantage.needs_value_model else None
    roles = Roles(copy.deepcopy(reference), reference, reward_model or reward, value)
    return PPOTrainer(
        roles,
        PROMPTS,
        settings=chosen,
        accelerator=Accelerator(cpu=True),
        eos_id=EOS,
        pad_id=PAD,
        text=text,
    )


def weights(trainer: PPOTrainer) -> torch.Tensor:
    """All weights of the trained models in one vector."""
    models = trainer.optimiser.models.values()
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
