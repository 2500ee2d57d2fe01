"""The four roles, loaded from the stages before."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.checkpoint import Artifact
from pipeline.config import require
from pipeline.context import context_of, fits
from pipeline.errors import UserError
from pipeline.ppo.sources import reads_tokens
from pipeline.ppo.wanted import Wanted

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
    from pipeline.sharding import recompute

    tokens = reward and reads_tokens(reward, tokenizer=load_tokenizer(sft.path))
    path = reward.path if reward and tokens else None
    if wanted.roles != "lora":
        roles = _roles_apart(sft.path, path, wanted=wanted, device=device)
    elif path is None:
        raise UserError("roles: lora needs the stage reward among reward.sources")
    else:
        roles = share_base(
            sft.path,
            path,
            lora=wanted.lora,
            seed=wanted.seed,
            device=device,
            critic=wanted.critic,
            attention=wanted.attention,
        )
        if wanted.recomputes:
            recompute(roles.policy.base.model)
    longest, model_config = wanted.longest, roles.policy.config
    require(
        fits(model_config, longest),
        f"max_prompt_tokens + max_response_tokens: {longest} exceeds the model's context "
        f"{context_of(model_config)}",
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
    from pipeline.ppo.sharing import TrunkValue
    from pipeline.sharding import recompute

    def trained(model: Any) -> Any:
        if wanted.recomputes:
            recompute(model)
        return placed(model, wanted=wanted, device=device)

    def frozen(model: Any) -> Any:
        return placed(model.requires_grad_(False), wanted=wanted, device=device)

    policy = trained(load_causal_lm(sft))
    value: Any = None
    if wanted.critic:
        trunk = wanted.roles == "trunk"
        value = TrunkValue(policy) if trunk else trained(_load_critic(sft, reward))
    return Roles(
        policy=policy,
        reference=frozen(load_causal_lm(sft)),
        reward_model=reward and frozen(load_reward_model(reward)),
        value=value,
    )


def placed(model: Any, *, wanted: Wanted, device: torch.device) -> Any:
    """Returns a model on its device, whole or this process's part of it."""
    from pipeline.attention import pack
    from pipeline.sharding import Sharded

    if wanted.sharding == "none":
        model.to(device)
    if device.type == "cpu":
        pack(model, precision=wanted.attention)
    if wanted.sharding == "none":
        return model
    offload = wanted.sharding == "fsdp2_offload"
    return Sharded(model, device=device, precision=wanted.precision, offload=offload)


def _load_critic(sft: Path, reward: Path | None) -> Any:
    """Returns a value model of its own.

    It starts from the reward model, or where none reads the policy's tokens, from the SFT model's
    body with a head of 0.
    """
    from pipeline.models import (
        load_reward_model,
        load_tokenizer,
        load_with_new_head,
        take_raw_scores,
    )

    if reward is not None:
        return load_reward_model(reward)
    value = load_with_new_head(sft, pad_id=load_tokenizer(sft).pad_token_id)
    take_raw_scores(value)
    log.info("ppo: the value model starts from %s with a head of 0", sft)
    return value
