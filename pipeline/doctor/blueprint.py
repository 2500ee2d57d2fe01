"""Models from a configuration alone: shapes without weights, as the stages would load them."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.attention import PACKED, may_pack
from pipeline.doctor.ledger import hollow, made_up
from pipeline.last_layer import spare
from pipeline.lora import LoRA, adapter_config, quiet_about_old_names
from pipeline.ppo.experience import Roles
from pipeline.ppo.sharing import AdaptedPolicy, AdaptedScorer, SharedBase, TrunkValue
from pipeline.sharding import recompute
from pipeline.weights import BEST

PACKED_BYTES = 0.516
"""Bytes of a weight in 4-bit NormalFloat: half a byte, and 0.127 bits for quantised constants
(Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The architecture of a recipe's language models.

    Attributes:
        model_type: of transformers.
        options: fields of that configuration, the vocabulary among them.
        packs: whether models read rows end to end, as on a processor.
    """

    model_type: str
    options: dict[str, Any]
    packs: bool

    @property
    def layers(self) -> int:
        """Layers of its body."""
        return int(self.config().num_hidden_layers)

    @property
    def context(self) -> int | None:
        """Positions it can read."""
        return getattr(self.config(), "max_position_embeddings", None)

    def of_depth(self, layers: int) -> "Blueprint":
        """Returns the same with another number of layers."""
        names = CONFIG_MAPPING[self.model_type].attribute_map
        kept = {key: value for key, value in self.options.items() if key != "layer_types"}
        options = kept | {names.get("num_hidden_layers", "num_hidden_layers"): layers}
        return dataclasses.replace(self, options=options)

    def config(self, **more: Any) -> Any:
        """Returns transformers' configuration."""
        return CONFIG_MAPPING[self.model_type](**(self.options | more))

    def causal_lm(self, *, quantised: bool = False) -> Any:
        """Returns a causal LM in float32 on the meta device, or its body's products in 4 bits."""
        return _made(AutoModelForCausalLM, self.config(), quantised=quantised)

    def classifier(self, *, quantised: bool = False) -> Any:
        """Returns a sequence classifier with one label, likewise."""
        config = self.config(num_labels=1, pad_token_id=0)
        config.reward_mean, config.reward_std = 0.0, 1.0
        return _made(AutoModelForSequenceClassification, config, quantised=quantised)

    def reader(self, model: Any) -> Any:
        """Returns a model without contents, with the attention by which ppo and evaluate read."""
        if self.packs and may_pack(model):  # as `pack` does, but for its trial on real numbers
            model.set_attn_implementation(PACKED["fp32"])
            spare(model.base_model)
        return hollow(model)


def _made(auto_class: Any, config: Any, *, quantised: bool) -> Any:
    with torch.device("meta"):
        model = auto_class.from_config(config, attn_implementation=BEST, dtype=torch.float32)
        if quantised:
            _quantise(model)
    return model.eval()


def _quantise(model: Any) -> None:
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), child, FourBit(module))
    model.requires_grad_(False)


class FourBit(nn.Linear):
    """A linear layer whose weights are 4-bit codes, unpacked to bfloat16 for every product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        codes = torch.empty(int(PACKED_BYTES * layer.weight.numel()), dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """Returns the product, as bitsandbytes' MatMul4Bit does: the way back unpacks again."""
        shape = (self.out_features, self.in_features)
        product: Tensor = _Unpacked.apply(states.to(torch.bfloat16), self.weight, shape)
        product = product if self.bias is None else product + self.bias
        return product.to(states.dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, codes: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = shape
        return states @ states.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return slope @ slope.new_empty(ctx.shape), None, None


class _Base(SharedBase):
    """A frozen base that came from no folder, with all its adapters."""

    def __init__(self, blueprint: Blueprint, adapters: Mapping[str, LoRA]) -> None:
        self.model = blueprint.causal_lm(quantised=adapters["policy"].quantise == "4bit")
        with quiet_about_old_names(), torch.device("meta"):
            for name, lora in adapters.items():
                config = adapter_config(lora, self.model, task="CAUSAL_LM")
                if name == "policy":
                    self.peft = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self.peft.add_adapter(name, config)
        blueprint.reader(self.model.eval())
        self.moving, self.on = [name for name in adapters if name != "reward"], None
        self.through("policy")


class _Scorer(AdaptedScorer):
    """A scorer on such a base."""

    def __init__(self, base: SharedBase, *, adapter: str, moves: bool) -> None:
        self.base, self.adapter, self.device = base, adapter, base.model.device
        self.config = copy.deepcopy(base.model.config)
        self.config.reward_mean, self.config.reward_std = 0.0, 1.0
        with made_up():
            self.score = nn.Linear(self.config.hidden_size, 1, bias=False).requires_grad_(moves)


def roles_of(
    blueprint: Blueprint,
    *,
    roles: str,
    loras: tuple[LoRA, LoRA],
    critic: bool,
    recomputes: bool = False,
    narrow: bool = False,
) -> Roles:
    """Returns the four roles as `pipeline.ppo.loading` loads them, without contents.

    Args:
        blueprint: of all of them.
        roles: separate, trunk or lora.
        loras: the policy's adapter, which says whether the base is in 4 bits, and the reward
            model's and the critic's, where roles is lora.
        critic: whether there is a value model.
        recomputes: whether layers of what is trained are computed again on the way back.
        narrow: whether separate roles are of bfloat16.
    """
    if roles == "lora":
        found = _on_one_base(blueprint, loras, critic=critic)
        if recomputes:
            recompute(found.policy.base.model)
        return found
    width = torch.bfloat16 if narrow else torch.float32
    policy, reference = (blueprint.reader(blueprint.causal_lm().to(width)) for _ in range(2))
    reward_model = blueprint.reader(blueprint.classifier().to(width)).requires_grad_(False)
    value: Any = None
    if critic and roles == "trunk":
        with made_up():
            value = TrunkValue(policy)
    elif critic:
        value = blueprint.reader(blueprint.classifier().to(width))
    if recomputes:
        for model in (policy, *([value] if critic and roles == "separate" else [])):
            recompute(model)
    return Roles(policy, reference.requires_grad_(False), reward_model, value)


def policies_on_one_base(blueprint: Blueprint, lora: LoRA) -> tuple[AdaptedPolicy, AdaptedPolicy]:
    """Returns SFT and PPO as `pipeline.evaluation.loading` loads them on one base."""
    base = _Base(blueprint, {"policy": lora})
    return AdaptedPolicy(base, adapter=None), AdaptedPolicy(base, adapter="policy")


def _on_one_base(blueprint: Blueprint, loras: tuple[LoRA, LoRA], *, critic: bool) -> Roles:
    lora, reward_lora = loras
    names = ["value", "reward"] if critic else ["reward"]
    base = _Base(blueprint, {"policy": lora, **dict.fromkeys(names, reward_lora)})
    return Roles(
        policy=AdaptedPolicy(base, adapter="policy"),
        reference=AdaptedPolicy(base, adapter=None),
        reward_model=_Scorer(base, adapter="reward", moves=False),
        value=_Scorer(base, adapter="value", moves=True) if critic else None,
    )


def tensors_of(model: Any) -> Iterator[Tensor]:
    """Yields the parameters and buffers of a model, or of a role that reads through one."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
