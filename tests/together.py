"""Runs checks in several connected processes at once: starting them costs far more than a check.

python -m pipeline.launch 2 tests.together tests.divided_checks OUT
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from accelerate import Accelerator

from pipeline.distributed import leave, rank

PATIENCE_SECONDS = 900
"""After that processes wait for one another; a machine with much else to do took 250."""


def names(module: str) -> list[str]:
    """The checks of a module, in the order they stand in."""
    found = vars(importlib.import_module(module))
    return [name for name, value in found.items() if inspect.isfunction(value) and "check_" in name]


def outcomes(module: str, folder: Path) -> dict[str, list[str]]:
    """What each process says of each check: nothing where it holds."""
    subprocess.run(
        [sys.executable, "-m", "pipeline.launch", "2", "tests.together", module, str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    said = [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]
    return {name: [of_one[name] for of_one in said] for name in said[0]}


def main(module: str, folder: Path) -> None:
    """Runs a module's checks; where one fails on one process alone, the other waits in vain."""
    Accelerator(cpu=True)
    said = {}
    for name in names(module):
        try:
            getattr(importlib.import_module(module), name)()
            said[name] = ""
        except Exception:  # noqa: BLE001 - told by the test of this name
            said[name] = traceback.format_exc()
    (folder / f"{rank()}.json").write_text(json.dumps(said))
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
