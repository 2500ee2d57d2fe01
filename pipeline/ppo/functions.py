"""Reward functions of the user's: a plain Python function scores the rollout."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.distributed import on_main
from pipeline.errors import UserError
from pipeline.ppo.function_worker import receive, send
from pipeline.reward.reading import Words

START_SECONDS = 300.0
"""Longest the import of a function's module may take: it may load a model of its own."""

GRACE_SECONDS = 5.0
"""How long a process that has closed its end may take to leave by itself."""


def function_file(name: str) -> Path:
    """Returns the file of the module in "module:function", without importing it.

    Raises:
        UserError: there is no such module.
    """
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"reward.sources: {name}: there is no module {module}; it is looked for in the folder "
            "the command runs in, and in PYTHONPATH"
        )
    return Path(spec.origin)


class Worker:
    """A process that runs one function; it is ended with this object, or when it takes too long."""

    def __init__(self, name: str, *, timeout_seconds: float) -> None:
        self.name, self.timeout_seconds = name, timeout_seconds
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.ppo.function_worker", name, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # so that its own processes can be ended with it
            )
        self.end = weakref.finalize(self, _end, self.process, self.connection)
        self._receive(START_SECONDS)

    def ask(self, *batch: Any) -> Any:
        """Returns the function's scores of a batch of prompts and responses.

        Raises:
            UserError: it raised, hung, ended its process, or returned no finite number a response.
        """
        with contextlib.suppress(OSError):  # it has ended: receiving tells how
            send(self.connection, batch)
        return self._receive(self.timeout_seconds)

    def _receive(self, seconds: float) -> Any:
        if not self.connection.poll(seconds):
            self.end()
            raise UserError(
                f"{self.name} gave no answer within {seconds:g} seconds; raise its timeout_seconds "
                "in reward.sources, or mend it"
            )
        try:
            kind, value = receive(self.connection)
            if kind not in ("ready", "scores", "fault"):
                raise ValueError(kind)
        except (ValueError, TypeError, RecursionError) as error:
            self.end()
            raise UserError(f"{self.name} wrote into files that are not its own") from error
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
            self.end()
            code = self.process.returncode
            raise UserError(f"{self.name} ended its process with exit code {code}") from error
        if kind == "fault":
            raise UserError(f"{self.name} {value}")
        return value


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    """Ends a worker and all that it started."""
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, SIGKILL)
    process.wait()


class FunctionScorer:
    """Scores a rollout by a user's function, on the main process: it sees all rows in their order.

    So what it returns cannot depend on the number of processes.
    """

    def __init__(self, name: str, *, words: Words, timeout_seconds: float) -> None:
        self.name, self.words, self.timeout_seconds = name, words, timeout_seconds
        self.workers: list[Worker] = []
        on_main(self._start)

    def _start(self) -> None:
        self.workers.append(Worker(self.name, timeout_seconds=self.timeout_seconds))

    def __call__(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> Float[Tensor, " response"]:
        """Returns the function's scores, the same on every process."""
        texts = [self.words.of(*row) for row in zip(prompts, responses, strict=True)]
        conversations, replies = [text.prompt for text in texts], [text.response for text in texts]
        scores = on_main(lambda: self.workers[0].ask(conversations, replies))
        return torch.tensor(scores, dtype=torch.float64)
