"""Small worlds for the PPO trainer: tiny models, and rewards one can predict."""

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from transformers import PreTrainedConfig

from pipeline.attention import pack
from pipeline.lora import ADAPTER, LoRA, merged, with_adapter, write_adapter
from pipeline.ppo.experience import Experience, Roles, length_mask
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.ppo.sharing import TrunkValue, share_base
from pipeline.ppo.trainer import Outcome, PPOTrainer
from pipeline.reward.training import reward_model_from
from tests.support import tiny_llama, tiny_reward_model

EOS, PAD, TARGET = 1, 0, 5
PROMPTS = [[2 + row % 9, *range(3, 3 + row % 4)] for row in range(20)]


class Speller:
    """A tokenizer that writes one text for every token."""

    def __init__(self, text: str = " word") -> None:
        self.text = text

    def decode(self, tokens: list[int]) -> str:
        return self.text * len(tokens)


class TokenCounter(torch.nn.Module):
    """A reward model whose score is the share of TARGET among all tokens of the row."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.config = PreTrainedConfig(reward_mean=0.0, reward_std=0.1)
        self.score = torch.nn.Identity()

    def base_model(self, *, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        hits = (input_ids == TARGET).cumsum(dim=1)
        share = hits / torch.arange(1, input_ids.shape[1] + 1)
        return SimpleNamespace(last_hidden_state=share[:, :, None])


class LengthCounter(torch.nn.Module):
    """A reward model whose score is so much for each token of the row."""

    def __init__(self, per_token: float) -> None:
        super().__init__()
        self.device, self.per_token = torch.device("cpu"), per_token
        self.config = PreTrainedConfig(reward_mean=0.0, reward_std=1.0)
        self.score = torch.nn.Identity()

    def base_model(self, *, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        tokens = attention_mask.cumsum(dim=1) * self.per_token
        return SimpleNamespace(last_hidden_state=tokens[:, :, None])


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
        "workers": 1,
    }
    return Settings(**{**fields, **groups, **changes})


def trainer(
    *,
    double: bool = False,
    reward_model: Any = None,
    text: torch.Tensor | None = None,
    sharing: str = "separate",
    packed: bool = False,
    device: str = "cpu",
    **changes: Any,
) -> PPOTrainer:
    """A trainer of tiny models; the policy starts as a copy of the reference.

    Models of their own read padded rows unless `packed`; those on one base always packed ones.
    """
    chosen = settings(**changes)
    if sharing == "lora":
        roles = roles_on_one_base(double=double, device=device)
    else:
        reference, reward = tiny_llama().to(device), tiny_reward_model().to(device)
        if double:
            reference, reward = reference.double(), reward.double()
        if packed:
            assert pack(reference)
            assert pack(reward)
        policy = copy.deepcopy(reference)
        value = TrunkValue(policy) if sharing == "trunk" else copy.deepcopy(reward)
        value = value if chosen.advantage.needs_value_model else None
        roles = Roles(policy, reference, reward_model or reward, value)
    return PPOTrainer(
        roles,
        PROMPTS,
        settings=chosen,
        accelerator=Accelerator(cpu=device == "cpu"),
        eos_id=EOS,
        pad_id=PAD,
        text=text,
    )


@functools.cache
def parents() -> Path:
    """A folder with sft and reward; the reward model is an adapter on sft, far from zero."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    sft, reward = folder / "sft", folder / "reward"
    tiny_llama().save_pretrained(sft)
    wrapped = with_adapter(
        reward_model_from(sft, pad_id=PAD, seed=5), LoRA(rank=4), task="SEQ_CLS", seed=6
    )
    disturb(wrapped)
    weights = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    write_adapter(reward / ADAPTER, wrapped.peft_config["default"], weights, base=sft)
    model = merged(reward_model_from(sft, pad_id=PAD, seed=5), reward / ADAPTER)
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    model.save_pretrained(reward)
    return folder


def disturb(adapted: Any) -> None:
    """Draws the B of all adapters, which start at zero."""
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def roles_on_one_base(*, double: bool, device: str = "cpu") -> Roles:
    """Four roles on the frozen sft of `parents`."""
    sft, reward = parents() / "sft", parents() / "reward"
    roles = share_base(sft, reward, lora=LoRA(rank=4), seed=3, device=device, critic=True)
    if double:
        for module in (roles.policy.base.model, roles.reward_model.score, roles.value.score):
            module.double()
    return roles


def invented_outcome(num_rows: int) -> Outcome:
    """An outcome that nothing was trained for: row r holds r % 3 + 1 tokens and scores r."""
    responses = [[TARGET] * (row % 3) + [EOS] for row in range(num_rows)]
    mask = length_mask(responses)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(mask.shape, generator=generator) * mask for _ in range(5)]
    experience = Experience(
        prompts=[[2, 3, 4] for _ in responses],
        responses=responses,
        mask=mask,
        logprobs=drawn[0],
        ref_logprobs=drawn[1],
        values=drawn[2],
        entropy=drawn[0].abs(),
        scores=torch.arange(num_rows).float(),
        ended=torch.arange(num_rows) % 2 == 0,
    )
    return Outcome({}, {}, experience, rewards=drawn[3], advantages=drawn[4])


def weights(trainer: PPOTrainer) -> torch.Tensor:
    """All weights of the trained models in one vector."""
    models = trainer.optimiser.models.values()
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
