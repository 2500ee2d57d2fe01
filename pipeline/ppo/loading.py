"""The four roles, loaded from the stages before."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.checkpoint import Artifact
from pipeline.config import require
from pipeline.errors import UserError
from pipeline.ppo.settings import Wanted
from pipeline.ppo.sources import reads_tokens

if TYPE_CHECKING:
    from pipeline.ppo.experience import Roles

log = logging.getLogger(__name__)


def load_roles(
    sft: Artifact, reward: Artifact | None, *, wanted: Wanted, device: torch.device
) -> "Roles":
    """Returns policy and reference from sft, reward model and value model from reward.

    Raises:
        UserError: no reward model scores on the adapters' base, or the context is too short.
    """
    from pipeline.models import load_tokenizer, take_raw_scores
    from pipeline.ppo.sharing import share_base

    tokens = reward and reads_tokens(reward, tokenizer=load_tokenizer(sft.path))
    path = reward.path if reward and tokens else None
    if wanted.roles != "lora":
        roles = _roles_apart(sft.path, path, wanted=wanted, device=device)
    elif path is None:
        raise UserError("roles: lora needs the stage reward among reward.sources")
    else:
        lora, seed, critic = wanted.lora, wanted.seed, wanted.critic
        roles = share_base(sft.path, path, lora=lora, seed=seed, device=device, critic=critic)
    longest, context = wanted.longest, roles.policy.config.max_position_embeddings
    require(
        longest <= context,
        f"max_prompt_tokens + max_response_tokens: {longest} exceeds the model's context {context}",
    )
    if not wanted.normalise:
        for model in filter(None, (roles.reward_model, roles.value)):
            take_raw_scores(model)
    return roles


def _roles_apart(
    sft: Path, reward: Path | None, *, wanted: Wanted, device: torch.device
) -> "Roles":
    from pipeline.models import load_causal_lm, load_reward_model
    from pipeline.ppo.experience import Roles

    policy = load_causal_lm(sft).to(device)
    return Roles(
        policy=policy,
        reference=load_causal_lm(sft).to(device).requires_grad_(False),
        reward_model=reward and load_reward_model(reward).to(device).requires_grad_(False),
        value=_load_critic(policy, sft=sft, reward=reward, trunk=wanted.roles == "trunk")
        if wanted.critic
        else None,
    )


def _load_critic(policy: Any, *, sft: Path, reward: Path | None, trunk: bool) -> Any:
    """Returns the value model: a head on the policy's trunk, or a model of its own.

    That starts from the reward model, or where none reads the policy's tokens, from the SFT
    model's body with a head of 0.
    """
    from pipeline.models import (
        load_reward_model,
        load_tokenizer,
        load_with_new_head,
        take_raw_scores,
    )
    from pipeline.ppo.sharing import TrunkValue

    if trunk:
        return TrunkValue(policy)
    if reward is not None:
        return load_reward_model(reward).to(policy.device)
    value = load_with_new_head(sft, pad_id=load_tokenizer(sft).pad_token_id).to(policy.device)
    take_raw_scores(value)
    log.info("ppo: the value model starts from %s with a head of 0", sft)
    return value
