"""Secrets in a configuration: refused, since it goes into manifests, model cards and the tracker.

Keys belong into the environment, of which nothing is written down.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""How the name of a variable of the environment that holds a secret ends."""
SHORTEST = 8
"""Letters of the shortest value that counts as a secret: shorter ones stand in words by chance."""
IN_ADDRESS = re.compile(r"\w://[^/\s@]+@")
"""A name, a password or a token in front of an address's host."""
OF_THE_HUB = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""A token of the hub."""


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Makes sure that no setting holds a secret.

    Args:
        settings: values by name, nested as the configuration is.

    Raises:
        UserError: one does; the message names the setting, never its value.
    """
    held = {
        name: value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST and not Path(value).exists()
    }
    for place, text in _texts(settings, ""):
        what = _secret_in(text, held)
        if what is not None:
            raise UserError(
                f"{place}: holds {what}, and settings are written into manifests, reports and the "
                "tracker. Leave it out here and set it in the environment, as in HF_TOKEN"
            )


def _secret_in(text: str, held: Mapping[str, str]) -> str | None:
    if IN_ADDRESS.search(text):
        return "a name or password in front of an address's host"
    if OF_THE_HUB.search(text):
        return "a token of the hub"
    names = [name for name, value in held.items() if value in text]
    return f"the value of the environment's {names[0]}" if names else None


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yields every text of nested values with its dotted name."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(name, place)
            yield from _texts(inner, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{number}]")
