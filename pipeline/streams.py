"""Named random streams: each is a function of the seed, and none shares numbers with another."""

import hashlib

LARGEST = 2**32
"""Seeds of numpy's and Python's global generators are below this."""


def stream(seed: int, name: str) -> int:
    """Returns the seed of a named random stream, below 2^64."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def short_stream(seed: int, name: str) -> int:
    """Returns the seed of a named random stream for libraries that take 32 bits."""
    return stream(seed, name) % LARGEST
