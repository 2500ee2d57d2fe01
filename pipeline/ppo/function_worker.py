"""The process in which a reward function of the user's runs. No torch.

Whatever the function does (hang, end its process, start threads that never return), training is
not part of it. `pipeline.ppo.functions` is the other end; the process ends when that end closes.
"""

import contextlib
import importlib
import json
import math
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from typing import Any

LONGEST = 1000
"""Signs that are told of an exception's message."""

Answer = tuple[str, Any]
"""("scores", list of floats), ("ready", None), or ("fault", what went wrong in words)."""


def answer(function: Callable[..., Any], prompts: list[Any], responses: list[str]) -> Answer:
    """Returns the function's scores, or what is wrong with it or with them."""
    wanted = len(responses)  # the function may change the list
    try:
        scores = function(prompts, responses)
        if not isinstance(scores, list | tuple):
            return "fault", f"returned {type(scores).__name__}, not a list of numbers"
        if len(scores) != wanted:
            return "fault", f"returned {len(scores)} scores for {wanted} responses"
        for row, score in enumerate(scores):
            if not _is_finite(score):
                return "fault", f"returned {score!r} for response {row}, not a finite number"
        return "scores", [float(score) for score in scores]
    except BaseException as error:  # noqa: BLE001 - whatever a user's function does is told
        return "fault", f"raised {_described(error)}"


def _is_finite(score: Any) -> bool:
    """Returns whether a score is a number that a float holds; some are too large for one."""
    try:
        return isinstance(score, Real) and math.isfinite(score)
    except OverflowError:
        return False


def _described(error: BaseException) -> str:
    """Returns an exception's kind and message, and the line it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    try:
        said = str(error)[:LONGEST]
    except Exception:  # noqa: BLE001 - an exception of the user's may have no text
        said = "without a message"
    return f"{type(error).__name__}: {said} ({Path(last.filename).name}, line {last.lineno})"


def serve(name: str, connection: Connection) -> None:
    """Answers one batch after the other until the other end closes."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except BaseException as error:  # noqa: BLE001 - a user's module may raise anything
        send(connection, ("fault", f"cannot be imported: {_described(error)}"))
        return
    send(connection, ("ready", None))
    try:
        while True:
            prompts, responses = receive(connection)
            send(connection, answer(function, prompts, responses))
    except (EOFError, OSError):
        return


def send(connection: Connection, message: Any) -> None:
    """Sends a message as JSON: what runs at the other end may write anything into the pipe."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> Any:
    """Returns the next message.

    Raises:
        EOFError: the other end is closed.
        OSError: the same, or what came is no message.
        ValueError: what came is no message.
    """
    return json.loads(connection.recv_bytes())


if __name__ == "__main__":
    # A function may have closed the pipe.
    with contextlib.suppress(OSError), Connection(int(sys.argv[2])) as pipe:
        serve(sys.argv[1], pipe)
