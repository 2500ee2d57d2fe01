"""Train the reward model: Bradley-Terry over every comparison of rated replies.

Reads   runs/<recipe>/data (preferences and prompts rows) and runs/<recipe>/sft
Writes  runs/<recipe>/reward, a sequence classifier with one label whose config.json holds
        reward_mean and reward_std; adapter/ where lora.rank is set; report.json on the validation
        texts; samples.jsonl
Command make reward RECIPE=cpu ARGS="--training.epochs=2"
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
    """Settings of the reward stage."""


def run(config: Config) -> None:
    """Makes the reward folder."""
    device = setup(config, divides="nobody" if config.lora.rank else "accelerate").device
    parents = {
        name: open_artifact(config.folder(name), kind=kind) for name, kind in PARENTS.items()
    } | outside_parents(config, "reward")
    with begin(config, stage="reward", kind="reward", parents=parents) as stage:
        from pipeline.reward.making import make_reward_model

        make_reward_model(config, stage, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="reward")


if __name__ == "__main__":
    raise SystemExit(main())
