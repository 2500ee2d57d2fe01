"""One side of the comparison: our trainer, one update whenever a line comes in."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.processes import peak_mb
from benchmarks.shared_roles import load_roles
from pipeline.parallel import choose_workers
from pipeline.ppo.rollout import Sampled
from pipeline.ppo.settings import KL, Advantage, Optimisation, Reward, Settings
from pipeline.ppo.trainer import PPOTrainer

MICROBATCH = 16
"""Rows that go through the models together; gradients do not depend on it."""


class Replaying(PPOTrainer):
    """Generates as ever, then learns from the rows of the workload.

    Attributes:
        replays: responses by prompt, for each update.
        sampled_tokens: how many the last update drew itself.
        aside: seconds that the last update spent on what sampling would have left of the workload's
            rows, which is not to be counted; the peer does the same off its clock.
    """

    replays: list[dict[tuple[int, ...], list[int]]]
    sampled_tokens: int
    aside: float

    def sample(
        self, prompts: Sequence[list[int]], *, update: int, name: str = "rollout"
    ) -> Sampled:
        """Returns the given responses, whatever was sampled."""
        drawn = super().sample(prompts, update=update, name=name)
        self.sampled_tokens = sum(map(len, drawn.responses))
        start = time.perf_counter()
        responses = [self.replays[update][tuple(prompt)] for prompt in prompts]
        experience = self.measure(list(prompts), Sampled(responses))
        figures = {
            name: [row[mask] for row, mask in zip(table, experience.mask, strict=True)]
            for name, table in (
                ("logprobs", experience.logprobs),
                ("entropy", experience.entropy),
            )
        }
        self.aside = time.perf_counter() - start
        return Sampled(responses, figures)


def build(
    folder: Path,
    *,
    minibatch: int | None = None,
    epochs: int | None = None,
    precision: str = "fp32",
    roles: str = "separate",
) -> Replaying:
    """Returns the trainer of a workload; as it says, on other minibatches, or with shared roles."""
    content = json.loads((folder / "workload.json").read_text())
    settings = Settings(
        seed=0,
        updates=len(content["rollouts"]),
        prompts_per_update=len(content["prompts"]),
        minibatch_size=minibatch or content["minibatch"],
        microbatch_size=MICROBATCH,
        max_response_tokens=content["response_length"],
        temperature=1.0,
        precision=precision,
        workers=choose_workers(0, torch.device("cpu")),
        kl=KL(coef=0.05, controller="fixed"),
        reward=Reward(missing_eos_score=None),
        advantage=Advantage(),
        optimisation=Optimisation(
            learning_rate=1e-6,
            value_learning_rate=1e-6,
            epochs=epochs or content["epochs"],
            max_grad_norm=1e9,  # TRL's trainer does not clip
        ),
    )
    trainer = Replaying(
        load_roles(roles, folder / "policy", folder / "reward"),
        content["prompts"],
        settings=settings,
        accelerator=Accelerator(cpu=True),
        eos_id=content["eos"],
        pad_id=content["pad"],
    )
    prompts = [tuple(prompt) for prompt in content["prompts"]]
    trainer.replays = [dict(zip(prompts, rows, strict=True)) for rows in content["rollouts"]]
    return trainer


def measured(trainer: Replaying, number: int) -> dict[str, Any]:
    """Returns seconds by phase, tokens sampled, and the peak memory so far in MB."""
    start = time.perf_counter()
    outcome = trainer.update(number)
    total = time.perf_counter() - start - trainer.aside
    generation = outcome.timings["time/rollout_seconds"] - trainer.aside
    training = outcome.timings["time/optimise_seconds"]
    return {
        "generation": generation,
        "scoring": total - generation - training,
        "training": training,
        "total": total,
        "sampled_tokens": trainer.sampled_tokens,
        "peak_mb": peak_mb(),
    }


def main() -> None:
    """Answers every line of standard input with one update's figures as JSON."""
    torch.set_num_threads(int(sys.argv[2]))
    trainer = build(Path(sys.argv[1]), precision=sys.argv[3], roles=sys.argv[4])
    for number, _ in enumerate(sys.stdin):
        sys.stdout.write(json.dumps(measured(trainer, number)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
