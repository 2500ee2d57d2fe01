"""Roles that share weights: a value head on the policy's trunk, or adapters on one frozen base.

A shared role is called as a model of its own is. Roles on one base switch its adapters when they
are called, so the backward pass of one must end before another is called: layers that activation
checkpointing computes again would be read through the other's adapter. `Optimiser` does so.
"""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from pipeline.attention import attention_of, pack
from pipeline.config import require
from pipeline.heads import logits_head
from pipeline.lora import (
    ADAPTER,
    LoRA,
    adapter_config,
    check_adapter,
    merged,
    quantisation,
    quiet_about_old_names,
    write_adapter,
)
from pipeline.models import load_causal_lm, take_constants
from pipeline.ppo.experience import Roles
from pipeline.pretrained import from_pretrained
from pipeline.streams import stream

HEAD = "base_model.model.score.weight"
"""Name of a classifier's head in the file of its adapter."""


SWITCHING = threading.Lock()
"""Held while adapters are switched, for passes through the same one may run side by side."""


class TrunkValue:
    """A value head on the policy's last hidden state, trained through it.

    Its values are in units of normalised scores. It starts at zero: 0 is what the SFT model's
    replies score on average.
    """

    def __init__(self, policy: Any) -> None:
        first = next(policy.parameters())
        width = policy.config.hidden_size
        self.score = nn.Linear(width, 1, bias=False, device=first.device, dtype=first.dtype)
        nn.init.zeros_(self.score.weight)
        self.base_model, self.prefix = policy.base_model, policy.base_model_prefix
        self.config = copy.deepcopy(policy.config)
        self.config.num_labels = 1
        self.config.reward_mean, self.config.reward_std = 0.0, 1.0

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the head; the trunk is the policy's."""
        return self.score.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the head."""
        return self.score.parameters()

    def modules(self) -> Iterator[nn.Module]:
        """Yields the modules it is made of."""
        yield from self.base_model.modules()
        yield from self.score.modules()

    def save_pretrained(self, folder: Path) -> None:
        """Writes trunk and head as a sequence classifier."""
        from transformers import AutoModelForSequenceClassification

        with torch.device("meta"):  # the weights are those that are there already
            model = AutoModelForSequenceClassification.from_config(self.config)
        body = self.base_model.state_dict()
        weights = {f"{self.prefix}.{name}": weight for name, weight in body.items()}
        model.load_state_dict({**weights, "score.weight": self.score.weight}, assign=True)
        model.save_pretrained(folder)


class SharedBase:
    """A frozen causal LM that holds the adapters of several roles; one of them is on, or none.

    Attributes:
        folder: where the base came from, in full precision.
        model: the base, read through the adapter that is on.
        peft: peft's wrapper of it.
    """

    def __init__(self, folder: Path, *, lora: LoRA, device: Any, attention: str = "fp32") -> None:
        self.folder = folder
        self.model = load_causal_lm(folder, quantisation=quantisation(lora.quantise)).to(device)
        pack(self.model, precision=attention)
        with quiet_about_old_names():
            config = adapter_config(lora, self.model, task="CAUSAL_LM")
            self.peft = get_peft_model(self.model, config, adapter_name="policy")
        self.moving = ["policy"]
        self.on: str | None = "policy"

    def add(self, name: str, adapter: Path, *, moves: bool) -> None:
        """Puts the adapter of a folder in beside the others."""
        check_adapter(adapter)
        config = PeftConfig.from_pretrained(adapter)
        config.modules_to_save = None  # the role holds its head itself
        self.peft.add_adapter(name, config)
        self.take(name, adapter)
        self.moving += [name] if moves else []
        self._switch("policy")

    def take(self, name: str, adapter: Path) -> None:
        """Gives an adapter that is in the weights of a folder's, but for a head."""
        check_adapter(adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
        weights.pop(HEAD, None)
        set_peft_model_state_dict(self.peft, weights, adapter_name=name)
        self.model.eval()  # peft makes adapters in training mode

    def through(self, name: str | None) -> Any:
        """Returns the model once it reads through this adapter; None: through none."""
        with SWITCHING:
            if name != self.on:
                self._switch(name)
        return self.model

    def weights(self, name: str | None) -> dict[str, nn.Parameter]:
        """Returns the weights of an adapter by their names in the model."""
        return {
            key: parameter
            for key, parameter in self.model.named_parameters()
            if "lora_" in key and key.endswith(f".{name}.weight")
        }

    def _switch(self, name: str | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter(name)
                for moving in self.moving:  # peft has frozen what is off
                    layer.set_requires_grad(moving)
        self.on = name


class AdaptedPolicy:
    """A causal LM on a shared base: the policy, or without an adapter the reference."""

    def __init__(self, base: SharedBase, *, adapter: str | None) -> None:
        self.base, self.adapter = base, adapter
        self.config, self.device = base.model.config, base.model.device

    @property
    def forward(self) -> Any:
        """The base's own, which says what it takes."""
        return self.base.model.forward

    def __call__(self, **inputs: Any) -> Any:
        """Returns the model's output through this role's adapter."""
        return self.base.through(self.adapter)(**inputs)

    def base_model(self, **inputs: Any) -> Any:
        """Returns the body's output through this role's adapter."""
        return self.base.through(self.adapter).base_model(**inputs)

    def get_output_embeddings(self) -> Any:
        """Returns the head, read through this role's adapter."""
        return logits_head(self.base.through(self.adapter))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the adapter's weights."""
        yield from self.base.weights(self.adapter).items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the adapter's weights."""
        yield from self.base.weights(self.adapter).values()

    def modules(self) -> Iterator[nn.Module]:
        """Yields the modules it is made of, the base's too."""
        yield from self.base.model.modules()

    def save_pretrained(self, folder: Path) -> None:
        """Writes the merged model, and the adapter beside it."""
        weights = get_peft_model_state_dict(
            self.base.peft, adapter_name=self.adapter, save_embedding_layers=False
        )
        config = self.base.peft.peft_config[self.adapter]
        write_adapter(folder / ADAPTER, config, weights, base=self.base.folder)
        merged(load_causal_lm(self.base.folder), folder / ADAPTER).save_pretrained(folder)


class AdaptedScorer:
    """A sequence classifier on a shared base: the reward model or the value model."""

    def __init__(self, base: SharedBase, *, adapter: str, source: Path, moves: bool) -> None:
        """Takes adapter, head and normalisation constants from a folder of the reward stage."""
        from transformers import AutoConfig

        base.add(adapter, source / ADAPTER, moves=moves)
        self.base, self.adapter, self.source = base, adapter, source
        attention = attention_of(base.model.config)
        self.config = from_pretrained(
            AutoConfig, source, weights=False, attn_implementation=attention
        )
        self.device = base.model.device
        head = load_file(source / ADAPTER / "adapter_model.safetensors")[HEAD]
        self.score = nn.Linear(head.shape[1], 1, bias=False, device=self.device)
        self.score.load_state_dict({"weight": head})
        self.score.requires_grad_(moves)

    def base_model(self, **inputs: Any) -> Any:
        """Returns the body's output through this role's adapter."""
        return self.base.through(self.adapter).base_model(**inputs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the head, which reads the last token."""
        yield "score", self.score

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the weights of adapter and head."""
        yield from self.base.weights(self.adapter).items()
        yield from self.score.named_parameters(prefix="score")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the weights of adapter and head."""
        yield from (parameter for _, parameter in self.named_parameters())

    def modules(self) -> Iterator[nn.Module]:
        """Yields the modules it is made of, the base's too."""
        yield from self.base.model.modules()
        yield from self.score.modules()

    def save_pretrained(self, folder: Path) -> None:
        """Writes the merged classifier, and the adapter with its head beside it."""
        from pipeline.reward.training import reward_model_from

        weights = get_peft_model_state_dict(
            self.base.peft, adapter_name=self.adapter, save_embedding_layers=False
        )
        config = PeftConfig.from_pretrained(self.source / ADAPTER)
        weights = {**weights, HEAD: self.score.weight}
        write_adapter(folder / ADAPTER, config, weights, base=self.base.folder)
        pad_id = self.config.pad_token_id
        model = merged(reward_model_from(self.base.folder, pad_id=pad_id, seed=0), folder / ADAPTER)
        take_constants(model, self.config)
        model.save_pretrained(folder)


@torch.no_grad()
def whole_weights(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a plain model that equals the policy, by their names there.

    An adapter is added to its base in new tensors: the base stays what it is to the last bit.
    """
    if not isinstance(policy, AdaptedPolicy):
        yield from policy.named_parameters()
        return
    model = policy.base.model
    adapted = {k: m for k, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        layer, _, rest = name.rpartition(".base_layer.")
        if layer in adapted and rest == "weight":
            delta = adapted[layer].get_delta_weight(policy.adapter)
            yield f"{layer}.weight", parameter + delta
        elif "lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def share_base(
    sft: Path,
    reward: Path,
    *,
    lora: LoRA,
    seed: int,
    device: Any,
    critic: bool,
    attention: str = "fp32",
) -> Roles:
    """Returns the roles on one frozen base, the SFT model.

    The policy is a new adapter, which changes nothing at first; the reference the base itself; the
    reward model the adapter and head that the reward stage trained on the same base; the value
    model a copy of those. "Adapters off" is the reference only because the base *is* the SFT model.

    Args:
        sft: folder of the base.
        reward: folder of the reward model.
        lora: the policy's adapter.
        seed: of its first weights.
        device: where the base goes.
        critic: whether there is a value model.
        attention: how it attends under autocast, of `pipeline.attention.PRECISIONS`.

    Raises:
        UserError: the reward model was trained without adapters.
    """
    require(
        (reward / ADAPTER).is_dir(),
        f"roles: lora needs {reward / ADAPTER}. Set lora.rank in the recipe's reward.yaml and run "
        "make reward again, or set roles to separate",
    )
    torch.manual_seed(stream(seed, "adapter"))
    base = SharedBase(sft, lora=lora, device=device, attention=attention)
    value = AdaptedScorer(base, adapter="value", source=reward, moves=True) if critic else None
    return Roles(
        policy=AdaptedPolicy(base, adapter="policy"),
        reference=AdaptedPolicy(base, adapter=None),
        reward_model=AdaptedScorer(base, adapter="reward", source=reward, moves=False),
        value=value,
    )
