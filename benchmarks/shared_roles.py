"""Models whose roles share weights, as the stages `sft` and `reward` leave them for `ppo`."""

from pathlib import Path
from typing import Any

MODES = ("separate", "trunk", "lora")
"""Values of ppo's `roles`."""
RANK = 16
"""Of the adapters."""


def write_adapted_reward(folder: Path, *, base: Path) -> None:
    """Writes a reward model merged from a random adapter on a base, and the adapter beside it.

    Args:
        folder: of the reward model.
        base: folder of the causal LM, whose padding is token 0.
    """
    from peft import get_peft_model_state_dict

    from pipeline.lora import ADAPTER, LoRA, merged, with_adapter, write_adapter
    from pipeline.reward.training import reward_model_from

    wrapped = with_adapter(
        reward_model_from(base, pad_id=0, seed=0), LoRA(rank=RANK), task="SEQ_CLS", seed=0
    )
    weights = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    write_adapter(folder / ADAPTER, wrapped.peft_config["default"], weights, base=base)
    model = merged(reward_model_from(base, pad_id=0, seed=0), folder / ADAPTER)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    model.save_pretrained(folder)


def load_roles(mode: str, sft: Path, reward: Path) -> Any:
    """Returns the roles as stages/ppo.py loads them, on the processor."""
    from pipeline.attention import pack
    from pipeline.lora import LoRA
    from pipeline.models import load_causal_lm, load_reward_model
    from pipeline.ppo.experience import Roles
    from pipeline.ppo.sharing import TrunkValue, share_base

    if mode == "lora":
        return share_base(sft, reward, lora=LoRA(rank=RANK), seed=0, device="cpu", critic=True)
    policy = load_causal_lm(sft)
    reference = load_causal_lm(sft).requires_grad_(False)
    reward_model = load_reward_model(reward).requires_grad_(False)
    models = [policy, reference, reward_model]
    if mode == "separate":
        models.append(load_reward_model(reward))
    for model in models:
        pack(model)
    value = TrunkValue(policy) if mode == "trunk" else models[-1]
    return Roles(policy=policy, reference=reference, reward_model=reward_model, value=value)
