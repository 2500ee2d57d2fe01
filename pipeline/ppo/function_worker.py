"""The process in which a reward function of the user's runs. No torch.

Whatever the function does (hang, end its process, start threads that never return), training is
not part of it. `pipeline.ppo.functions` is the other end; the process ends when that end closes.
"""

import importlib
import math
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from typing import Any

Answer = tuple[str, Any]
"""("scores", list of floats), ("ready", None), or ("fault", what went wrong in words)."""


def answer(function: Callable[..., Any], prompts: list[Any], responses: list[str]) -> Answer:
    """Returns the function's scores, or what is wrong with it or with them."""
    try:
        scores = function(prompts, responses)
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises is told
        return "fault", f"raised {_described(error)}"
    if not isinstance(scores, list | tuple):
        return "fault", f"returned {type(scores).__name__}, not a list of numbers"
    if len(scores) != len(responses):
        return "fault", f"returned {len(scores)} scores for {len(responses)} responses"
    for row, score in enumerate(scores):
        if not isinstance(score, Real) or not math.isfinite(score):
            return "fault", f"returned {score!r} for response {row}, not a finite number"
    return "scores", [float(score) for score in scores]


def _described(error: BaseException) -> str:
    """Returns an exception's kind and message, and the line it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def serve(name: str, connection: Connection) -> None:
    """Answers one batch after the other until the other end closes."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        connection.send(("fault", f"cannot be imported: {_described(error)}"))
        return
    connection.send(("ready", None))
    try:
        while True:
            connection.send(answer(function, *connection.recv()))
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    with Connection(int(sys.argv[2])) as pipe:
        serve(sys.argv[1], pipe)
