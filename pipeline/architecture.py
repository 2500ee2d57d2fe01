"""The architecture of a recipe's model, as the recipe says it (no torch here)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Architecture of a model trained from random weights, or of the one that is started from."""

    model_type: str = "llama"
    """Any causal-LM model_type of transformers (llama, qwen3, gpt2, …)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of that model's transformers configuration (hidden_size, num_hidden_layers, …)."""

    def differences(self, config: Any) -> list[str]:
        """Returns what a model's transformers configuration says otherwise, option by option."""
        said = {"model_type": self.model_type, **self.options} if self.options else {}
        return [
            f"{name} {wanted!r} is {getattr(config, name, None)!r} there"
            for name, wanted in said.items()
            if getattr(config, name, None) != wanted
        ]
