"""How many tokens a model reads."""

from typing import Any

POSITIONS = "max_position_embeddings"
"""Name under which Transformers' configurations keep it; those without any bound have none."""


def context_of(config: Any) -> int | None:
    """Returns the most tokens that a model of a Transformers configuration reads; None: any."""
    positions: int | None = getattr(config.get_text_config(), POSITIONS, None)
    return positions or None


def fits(config: Any, num_tokens: int) -> bool:
    """Returns whether a model of a Transformers configuration reads so many tokens."""
    context = context_of(config)
    return context is None or num_tokens <= context
