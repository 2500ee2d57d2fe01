"""The chain that is killed: its stages, their command lines, and a run's folders."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.manifest import STAGES

TRAINING = "--training.steps=24 --training.log_every=2 --training.eval_every=6 --saving.every=3"
ARGUMENTS = {
    "data": "--chats.synthetic_conversations=40",
    "pretrain": f"{TRAINING} --dropout=0.1",
    "sft": TRAINING,
    "reward": f"{TRAINING} --dropout=0.1",
    "reward_guard": f"{TRAINING} --dropout=0.1",
    "ppo": "--updates=10 --saving.every=3 --guard.every=1",
    "evaluate": "--num_prompts=12",
}
"""Settings beside the smoke recipe's. The data are few, so that every stage passes over them more
than once; dropout makes the generators' states matter; points lie between rows of metrics and
between looks at validation."""
NAME = "chain"
"""Every run has this name, which report writes into its page."""


@dataclass(frozen=True)
class Chain:
    """A run of the smoke recipe in a folder of its own.

    Attributes:
        checkout: folder of the Makefile.
        run: the run's folder.
    """

    checkout: Path
    run: Path

    def folder(self, stage: str) -> Path:
        """Returns the folder of a stage."""
        return self.run / stage

    def line(self, stage: str) -> list[str]:
        """Returns the command that a user would type."""
        words = ["make", stage, "RECIPE=smoke", f"RUN={self.run}", f"PYTHON={sys.executable}"]
        return [*words, f"ARGS={ARGUMENTS[stage]}"] if stage in ARGUMENTS else words

    def copy_parents(self, stage: str, run: Path) -> "Chain":
        """Returns a new run that holds everything before a stage, with its times."""
        run.mkdir(parents=True)
        for name in STAGES[: STAGES.index(stage)]:
            if self.folder(name).is_dir():
                ignored = shutil.ignore_patterns("checkpoints")
                shutil.copytree(self.folder(name), run / name, ignore=ignored)
        return Chain(self.checkout, run)


def needed(stages: Sequence[str]) -> tuple[str, ...]:
    """Returns the stages that have to be there for the last of these to run."""
    return STAGES[: max(STAGES.index(stage) for stage in stages) + 1]


def points(folder: Path) -> list[Path]:
    """Returns the resume points of a stage's folder, the oldest first."""
    found = [path.parent for path in folder.glob("checkpoints/step-*/point.json")]
    return sorted(found, key=lambda point: int(point.name.removeprefix("step-")))


def steps_per_pass(chain: Chain, stage: str) -> int | None:
    """Returns the steps or updates of one pass over the training rows; None where nothing trains.

    Rows that fill no minibatch sit out the pass; a rollout takes the rest of one pass and the
    first prompts of the next.
    """
    manifest = json.loads((chain.folder(stage) / "manifest.json").read_text(encoding="utf-8"))
    config = manifest["content"]["config"]
    summary = manifest["circumstances"]["summary"]
    if stage == "ppo":
        from pyarrow import parquet

        rows = parquet.read_metadata(chain.folder("data") / "prompts-train.parquet").num_rows
        return rows // config["prompts_per_update"]
    if "rankings" in summary:
        return summary["rankings"] // config["training"]["minibatch_size"]
    return int(summary["steps"] / summary["epochs"]) if "epochs" in summary else None
