"""The other side: TRL 1.12's PPOTrainer, unmodified, on the same models and prompts.

Runs in an environment of its own (trl 1.12.0) and so imports nothing of the pipeline.

Run     python -m benchmarks.time_to_quality.peer JOB.json      (written by the benchmark)
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: TID251 - the peer

from benchmarks.time_to_quality.snapshots import Snapshots


class Normalised(torch.nn.Module):
    """A reward model's head whose scores are those that the pipeline's PPO sees."""

    def __init__(self, head: torch.nn.Module, *, mean: float, std: float) -> None:
        super().__init__()
        self.head, self.mean, self.std = head, mean, std

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns (raw - mean) / std."""
        return (self.head(states) - self.mean) / self.std


class Saving(TrainerCallback):
    """Saves the policy between two updates; ends the process when the time is up."""

    def __init__(self, trainer: PPOTrainer, snapshots: Snapshots) -> None:
        self.trainer, self.snapshots = trainer, snapshots

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Is called after every update."""
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model).policy
        if not self.snapshots.after_update(policy.save_pretrained):
            sys.exit()


def build(job: dict[str, Any], *, output: str) -> PPOTrainer:
    """Returns the library's trainer with the job's settings."""
    tokenizer = AutoTokenizer.from_pretrained(job["sft"], padding_side="left")
    arguments = PPOConfig(
        output_dir=output,
        seed=job["seed"],
        num_sample_generations=0,
        stop_token="eos",  # noqa: S106
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **job["settings"],
    )

    def causal() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["sft"], dtype=torch.float32)

    def classifier() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(
            job["reward"], dtype=torch.float32
        )
        constants = {"mean": model.config.reward_mean, "std": model.config.reward_std}
        model.score = Normalised(model.score, **constants)
        return model

    rows = Dataset.from_dict({"input_ids": job["prompts"]})
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=causal(),
        ref_model=causal(),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
    )


def main() -> None:
    """Trains until the settings' episodes are done or the time is up."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    with tempfile.TemporaryDirectory() as output:
        trainer = build(job, output=output)
        snapshots = Snapshots(Path(job["folder"]), interval=job["interval"], limit=job["limit"])
        trainer.add_callback(Saving(trainer, snapshots))
        trainer.train()


if __name__ == "__main__":
    main()
