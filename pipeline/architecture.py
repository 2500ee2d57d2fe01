"""The architecture of a model trained from random weights, as a recipe says it (no torch here)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Architecture of a model trained from random weights."""

    model_type: str = "llama"
    """Any causal-LM model_type of transformers (llama, qwen3, gpt2, …)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of that model's transformers configuration (hidden_size, num_hidden_layers, …)."""
