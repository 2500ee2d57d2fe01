"""How a causal language model of Transformers is given a text, and goes on with it."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

CACHE = "past_key_values"
"""Name under which models take what they keep of the tokens before."""
UNMASKED = ("recurrent_gemma",)
"""Models that take it and yet keep states in their layers, and read what fills a row up."""


def steps_by_cache(model: Any) -> bool:
    """Returns whether a model goes on from what it keeps of rows that are filled up on the left.

    Others keep states of their own kinds (Mamba, RWKV, xLSTM), or nothing (the first GPT): they
    read their rows anew at every token, those of one length together.
    """
    forward: Any = getattr(model, "forward", None)
    if not isinstance(getattr(forward, "__self__", None), PreTrainedModel):
        return True
    takes = CACHE in inspect.signature(forward).parameters
    return takes and model.config.model_type not in UNMASKED


def taken(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns what a model takes of the inputs of a row whose padding stands behind it.

    Causal models need no mask there, and count positions from the start by themselves.
    """
    if steps_by_cache(model):
        return inputs
    ids: Tensor = inputs["input_ids"]
    return {"input_ids": ids}
