"""From last hidden states to logits, as a model itself does it.

Most models multiply by a matrix and stop there. Some scale what comes out (Granite, Cohere) or cap
it (Gemma): what a head says alone is another distribution than the one that they sample from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

SCALES = (
    "logit_scale", "logits_scaling", "logits_mup_width_multiplier", "output_multiplier",
    "lm_head_multiplier",
)  # fmt: skip
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration fields of models whose logits are more than hidden states times the head."""

States = Float[Tensor, "token width"]
Logits = Float[Tensor, "token vocabulary"]


def reshapes_logits(config: PreTrainedConfig) -> bool:
    """Returns whether a model's logits are more than its last hidden states times the head."""
    scaled = any(getattr(config, name, None) not in (None, 1) for name in SCALES)
    return scaled or any(getattr(config, name, None) is not None for name in CAPS)


def logits_head(model: Any) -> Callable[[States], Logits]:
    """Returns what makes logits of a causal LM's last hidden states, or of a role's that reads one.

    Of a divided model it works where its weights are gathered, as the head does.
    """
    if isinstance(model, PreTrainedModel) and reshapes_logits(model.config):
        return partial(_own_logits, model)
    head: Callable[[States], Logits] = model.get_output_embeddings()
    return head


def _own_logits(model: PreTrainedModel, states: States) -> Logits:
    """Returns what the model's own forward pass makes of states that stand in for its body's."""

    def given(*_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)

    body = _twin(model.base_model)
    body.forward = given
    whole = _twin(model)
    setattr(whole, model.base_model_prefix, body)
    read = type(model).forward  # not one that was put in its place, which would read the model
    logits: Tensor = read(whole, inputs_embeds=states[None], use_cache=False).logits
    return logits[0]


def _twin(module: Any) -> Any:
    """Returns another module of the same parts; one that is divided has no copy of its own."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), _modules=dict(module._modules))  # noqa: SLF001
    return twin
