"""Tokens per second of pretrain, sft and reward beside a bare loop over the same batches.

Each run is a process: the stage's real `run()` up to the last step, then the same model, batches,
loss and optimizer without Trainer, callbacks and collation. One thread; seconds are the processor's
own, so that a shared machine distorts them little.

Run     python -m benchmarks.stages [--parents=runs/cpu --recipe=cpu --steps=20 --runs=5]
        prints the table of docs/costs.md
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import output_of

STAGES = {
    "pretrain": "pipeline.fitting",
    "sft": "pipeline.fitting",
    "reward": "pipeline.reward.making",
}
"""Each stage, and the module in which it looks for `fit`."""
WARM_STEPS = 2
"""Steps before the clock starts, in both loops."""


class EnoughError(Exception):
    """Ends a stage once both loops are measured."""


def clocked_fit(fit: Callable[..., float], found: dict[str, float]) -> Callable[..., None]:
    """Returns a `fit` that trains, trains barely, and ends the stage."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Notes the processor's seconds behind every step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Notes them."""
            self.ends.append(time.process_time())

    def measured(trainer: Any, run: Any, **given: Any) -> None:
        clock = Clock()
        trainer.add_callback(clock)
        fit(trainer, run, **given)
        found["stage"] = clock.ends[-1] - clock.ends[WARM_STEPS - 1]
        found["bare"] = bare_seconds(trainer)
        found["tokens"] = given["tokens_per_step"] * (len(clock.ends) - WARM_STEPS)
        raise EnoughError

    return measured


def bare_seconds(trainer: Any) -> float:
    """Returns the seconds of a plain loop over the trainer's batches, behind the first steps."""
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model).train()
    optimizer = trainer.optimizer.optimizer
    start = 0.0
    for number, batch in enumerate(list(trainer.get_train_dataloader())):
        if number == WARM_STEPS:
            start = time.process_time()
        count = (batch["labels"] != -100).sum()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def measure(stage: str, parents: Path, recipe: str, steps: int) -> dict[str, float]:
    """Returns the processor's seconds of the stage's loop and of the bare one, and their tokens."""
    from pipeline.config import load

    module, holder = (
        importlib.import_module(f"stages.{stage}"),
        importlib.import_module(STAGES[stage]),
    )
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for parent in parents.resolve().iterdir():
            if parent.is_dir() and parent.name != stage and not parent.name.startswith("."):
                (Path(folder) / parent.name).symlink_to(parent)
        config = load(
            module.Config,
            [
                f"--recipe={recipe}", f"--run={folder}", "--tracking=none", "--threads=1",
                f"--training.steps={steps}", "--training.warmup_steps=0",
                "--training.eval_every=0", "--saving.every=0",
            ],
            stage=stage,
        )  # fmt: skip
        holder.fit = clocked_fit(holder.fit, found)
        try:
            module.run(config)
        except EnoughError:
            return found
    raise AssertionError(f"{stage} never trained")


def main() -> None:
    """Prints one row a stage."""
    parser = argparse.ArgumentParser(description="what the Trainer adds to a bare loop")
    parser.add_argument("--parents", type=Path, default=Path("runs/cpu"))
    parser.add_argument("--recipe", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=list(STAGES))
    given = parser.parse_args()
    if given.only:
        found = measure(given.only, given.parents, given.recipe, given.steps)
        sys.stdout.write("\n" + json.dumps(found))
        return
    words = ("--parents", given.parents, "--recipe", given.recipe, "--steps", given.steps)
    found_of: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
    for _ in range(given.runs):
        for stage, runs in found_of.items():
            said = output_of("benchmarks.stages", *words, "--only", stage)
            runs.append(json.loads(said.splitlines()[-1]))
    sys.stdout.write("| stage | stage, tokens/s | bare, tokens/s | ratio (smallest to largest) |\n")
    sys.stdout.write("|---|---|---|---|\n")
    for stage, runs in found_of.items():
        speeds = [
            f"{median(r['tokens'] / r[name] for r in runs):,.0f}" for name in ("stage", "bare")
        ]
        ratios = [r["bare"] / r["stage"] for r in runs]
        spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        sys.stdout.write(f"| {stage} | {' | '.join(speeds)} | {spread} |\n")


if __name__ == "__main__":
    main()
