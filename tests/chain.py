"""The real chain of the smoke recipe in a folder of a test's own, driven by make."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.security.secrets import PLANTED

STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report"]
TIMEOUT_SECONDS = 600


def environment() -> dict[str, str]:
    """Ours without what an outer make or a tracker's account would change, with secrets in it."""
    dropped = ("MAKE", "MFLAGS", "WANDB_", "RANK", "WORLD_SIZE")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return inherited | PLANTED | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def command(*words: str) -> list[str]:
    """A make command on the smoke recipe with this interpreter."""
    return ["make", "RECIPE=smoke", f"PYTHON={sys.executable}", *words]


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs make to its end."""
    return subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def planned(folder: Path, *words: str) -> list[str]:
    """The stages that make would run, in order."""
    return re.findall(r"-m stages\.(\w+)", make(folder, "-n", *words).stdout)


def closing_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that finished, by their closing lines."""
    return re.findall(r"^(\w+): .* -> runs/\S+$", result.stderr, re.MULTILINE)


def copy_sources(folder: Path) -> Path:
    """Copies into a folder what make needs there."""
    for name in ("pipeline", "stages", "configs"):
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("Makefile", folder)
    return folder
