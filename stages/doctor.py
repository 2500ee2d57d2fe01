"""Says before anything is loaded what a recipe will take, what will not fit, and what mends it.

Reads   configs/<recipe>, accelerate's YAML, and of runs/<recipe> what is there already. No weights.
Writes  to the terminal only. The exit code is 0 when all is well, 1 when something will not fit or
        does not agree, and 2 for a mistake in the command itself.
Run     make doctor RECIPE=cpu
        python -m stages.doctor --recipe=llama-3.1-8b-ultrafeedback --devices=8 --device=a100
        python -m stages.doctor --recipe=cpu --ppo.roles=trunk     with other settings of a stage
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.command import INTERRUPTED, USER_MISTAKE, Parser
from pipeline.config import load, require
from pipeline.distributed import PLACE
from pipeline.errors import UserError
from pipeline.manifest import OPTIONAL, STAGES
from pipeline.terminal import start_logging

if TYPE_CHECKING:
    from pipeline.doctor.machine import Machine
    from pipeline.doctor.need import Need
    from pipeline.doctor.recipe import Recipe

log = logging.getLogger("stages.doctor")

MODELS = ("pretrain", "sft", "reward", "reward_guard", "ppo", "evaluate")
"""Stages with models; the others read rows and take little."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is looked at, and for which machine."""

    recipe: str = "cpu"
    """Recipe: the folder below configs/ that is looked at."""
    run: str = ""
    """Run folder; runs/<recipe> when empty."""
    num_processes: int = 0
    """Processes of a stage; 0 takes accelerate's YAML, else one."""
    accelerate_config: str = ""
    """Accelerate's YAML; it says whether models are divided, and whether a processor computes."""
    devices: int = 0
    """GPUs of a machine that is not this one; 0 looks at this machine."""
    device: str = ""
    """What these GPUs are, as in a100."""
    device_memory: str = ""
    """Their memory, as in 80GB, where it is another."""
    words: tuple[str, ...] = ()
    """Settings of stages, each with the stage before it, as in --sft.training.microbatch_size=8."""

    def __post_init__(self) -> None:
        known = sorted(path.parent.name for path in Path("configs").glob("*/pretrain.yaml"))
        require(
            self.recipe in known,
            f"no recipe configs/{self.recipe}; recipes here: {', '.join(known)}",
        )
        for name in ("num_processes", "devices"):
            value = getattr(self, name)
            require(value >= 0, f"--{name}: must be at least 0, got {value}")
        path = self.accelerate_config
        require(not path or Path(path).is_file(), f"--accelerate_config: no file {path}")
        for word in self.words:
            stage, _, rest = word.removeprefix("--").partition(".")
            require(
                word.startswith("--") and stage in STAGES and "=" in rest,
                f"{word}: no setting of a stage, as in --sft.max_length=64",
            )

    @property
    def run_dir(self) -> Path:
        """Folder that holds one subfolder per stage."""
        return Path(self.run or f"runs/{self.recipe}")


def machine_of(config: Config) -> "Machine":
    """Returns the machine that the command names, or this one.

    On this one several processes without a YAML are on its processor, as stages start them. Where
    it has no GPUs and the YAML is for some, they are the first kind.
    """
    from pipeline.doctor import machine

    processes = config.num_processes or config.devices
    on_gpus, sharding = processes <= 1, machine.Sharding()
    if config.accelerate_config:
        said, on_gpus, sharding = machine.read_accelerate(Path(config.accelerate_config))
        processes = processes or said
    named = config.devices or config.device or config.device_memory
    elsewhere = config.accelerate_config and on_gpus and not machine.has_gpus()
    if not (named or elsewhere):
        return machine.this_machine(processes or 1, on_gpus=on_gpus, sharding=sharding)
    memory = machine.size_of(config.device_memory) if config.device_memory else 0
    return machine.gpus(config.device, processes=processes or 1, memory=memory, sharding=sharding)


def stage_configs(config: Config, *more: str) -> dict[str, Any]:
    """Returns the settings of every stage that the recipe has, with the command's words.

    Stages know nothing of each other: their modules are looked up by name, as make does.

    Raises:
        UserError: a stage's settings are refused.
    """
    found = {}
    for stage in STAGES:
        if stage in OPTIONAL and not Path("configs", config.recipe, f"{stage}.yaml").is_file():
            continue
        words = [f"--recipe={config.recipe}", f"--run={config.run_dir}"]
        words += [
            f"--{word.removeprefix(f'--{stage}.')}"
            for word in (*config.words, *more)
            if word.startswith(f"--{stage}.")
        ]
        found[stage] = load(importlib.import_module(f"stages.{stage}").Config, words, stage=stage)
    return found


def recipe_of(config: Config, *more: str) -> "Recipe":
    """Returns the recipe as the command has it, with some words more."""
    from pipeline.doctor.recipe import Recipe

    configs = stage_configs(config, *more)
    return Recipe(name=config.recipe, folder=config.run_dir, configs=configs)


def parse(argv: Sequence[str] | None) -> Config:
    """Returns the configuration of a command line."""
    parser = Parser(
        prog="python -m stages.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="cpu", help="recipe that is looked at (cpu)")
    parser.add_argument("--run", default="", help="run folder (runs/<recipe>)")
    parser.add_argument("--num_processes", type=int, default=0, help="processes of a stage")
    parser.add_argument("--accelerate_config", default="", help="accelerate's YAML")
    parser.add_argument("--devices", type=int, default=0, help="GPUs, of a machine not this one")
    parser.add_argument("--device", default="", help="what they are, as in a100, h100, rtx4090")
    parser.add_argument("--device_memory", default="", help="their memory, as in 80GB")
    values, words = parser.parse_known_args(argv)
    return Config(**vars(values), words=tuple(words))


def run(config: Config) -> int:
    """Prints what the recipe takes and what is wrong; returns 0 when all is well, else 1."""
    from pipeline.doctor.checks import examine
    from pipeline.doctor.lengths import looked_at
    from pipeline.doctor.mending import mend
    from pipeline.doctor.needs import Planner
    from pipeline.doctor.text import told

    recipe, machine = recipe_of(config), machine_of(config)
    blueprint = recipe.blueprint(packs=not machine.is_gpu)
    lengths, damaged = looked_at(recipe)
    planner = Planner(blueprint=blueprint, machine=machine, ranking=recipe.ranking, lengths=lengths)
    needs = [planner.need(s, recipe.configs) for s in MODELS if s in recipe.configs]

    def mended(need: "Need") -> str:
        def attempt(words: list[str]) -> "Need":
            return planner.need(need.stage, stage_configs(config, *words))

        return mend(need.stage, recipe.configs, machine=machine, attempt=attempt)

    mending = {need.stage: mended(need) for need in needs if not need.fits}
    findings = examine(recipe, machine, needs, copy=planner.copy_bytes)
    findings += [finding for finding in damaged if finding not in findings]
    sys.stdout.write(told(recipe, planner, needs=needs, findings=findings, mending=mending) + "\n")
    return int(bool(mending) or any(finding.state == "wrong" for finding in findings))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    start_logging(logging.WARNING)
    for name in PLACE:  # it is one process, whatever a cluster's pod says of others
        os.environ.pop(name, None)
    try:
        return run(parse(argv))
    except UserError as error:
        log.error("doctor: %s", error)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
