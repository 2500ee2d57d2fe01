"""Train the guard: a second reward model, from other texts, that only watches ppo.

Reads   runs/<recipe>/data (guard_preferences and prompts rows) and runs/<recipe>/sft
Writes  runs/<recipe>/reward_guard, with the same files as reward
Command make reward_guard RECIPE=cpu; then make ppo ARGS="--guard.every=1"
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.checkpoint import begin, open_artifact
from pipeline.command import command
from pipeline.distributed import setup
from pipeline.origin import outside_parents
from pipeline.reward.settings import RewardConfig

PARENTS = {"data": "dataset", "sft": "causal-lm"}


@dataclass(frozen=True, kw_only=True)
class Config(RewardConfig):
    """Settings of the reward_guard stage."""

    row_type: str = "guard_preferences"
    """Rows that are trained on; the guard's share no text with the reward model's."""


def run(config: Config) -> None:
    """Makes the reward_guard folder."""
    device = setup(config, divides="nobody" if config.lora.rank else "accelerate").device
    parents = {
        name: open_artifact(config.folder(name), kind=kind) for name, kind in PARENTS.items()
    } | outside_parents(config, "reward_guard")
    with begin(config, stage="reward_guard", kind="reward", parents=parents) as stage:
        from pipeline.reward.making import make_reward_model

        make_reward_model(config, stage, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="reward_guard")


if __name__ == "__main__":
    raise SystemExit(main())
