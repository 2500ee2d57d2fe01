"""The other side: TRL 1.12's PPOTrainer, unmodified, one update whenever a line comes in.

Runs in an environment of its own (trl 1.12.0) and so imports nothing of the pipeline. Its phases
are told apart by the library functions that begin them: `batch_generation`, the first permutation
of rows, `log`. The third argument is the precision, bf16 by the library's own flag. With a fourth
it instead writes the gradients of one update on one minibatch of all rows, and stops.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: TID251 - the peer

from benchmarks.processes import peak_mb

STEPS = 100_000


class Phases(TrainerCallback):
    """Stands in for `batch_generation`, times the phases, and waits between updates."""

    def __init__(self, content: dict[str, Any], *, answers: Any) -> None:
        self.content, self.answers, self.update = content, answers, 0
        self.generate, self.permute = ppo_trainer.batch_generation, np.random.permutation
        self.seconds: dict[str, float] = {}
        self.sampled_tokens, self.scoring_since, self.training_since = 0, 0.0, None
        ppo_trainer.batch_generation = self.generation
        np.random.permutation = self.permutation

    def generation(self, model: Any, queries: Any, *rest: Any) -> tuple[Any, Any]:
        """Generates as the library does, then hands on the workload's rows with their logits."""
        start = time.perf_counter()
        own, _ = self.generate(model, queries, *rest)
        self.seconds["generation"] = time.perf_counter() - start
        width, pad = queries.shape[1], self.content["pad"]
        self.sampled_tokens = int((own[:, width:] != pad).sum())
        rows = self.content["rollouts"][self.update]
        prompts = [tuple(prompt) for prompt in self.content["prompts"]]
        replay = dict(zip(prompts, rows, strict=True))
        responses = torch.full((len(queries), self.content["response_length"]), pad)
        for index, query in enumerate(queries):
            response = replay[tuple(query[query != pad].tolist())]
            responses[index, : len(response)] = torch.tensor(response)
        everything = torch.cat([queries, responses], dim=1)
        logits = ppo_trainer.forward(model, everything, pad).logits[:, width - 1 : -1]
        self.scoring_since = time.perf_counter()
        return everything, logits

    def permutation(self, size: int) -> Any:
        """Marks where an update begins to learn."""
        if self.training_since is None:
            self.training_since = time.perf_counter()
            self.seconds["scoring"] = self.training_since - self.scoring_since
        return self.permute(size)

    def logged(self, _: dict[str, float]) -> None:
        """Marks where it has learned."""
        self.seconds["training"] = time.perf_counter() - self.training_since
        self.training_since = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answers with the figures of the update and waits for the next line."""
        figures = {
            **self.seconds,
            "total": sum(self.seconds.values()),
            "sampled_tokens": self.sampled_tokens,
            "peak_mb": peak_mb(),
        }
        self.answers.write(json.dumps(figures) + "\n")
        self.answers.flush()
        self.update += 1
        if not sys.stdin.readline():
            sys.exit()


def build(
    folder: Path, content: dict[str, Any], *, output: str, whole: bool, precision: str
) -> PPOTrainer:
    """Returns the library's trainer at the workload's settings."""
    words = {f"t{index}": index for index in range(content["vocabulary"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")),  # noqa: S106
        pad_token=f"t{content['pad']}",
        eos_token=f"t{content['eos']}",
        padding_side="left",
    )
    num_prompts = len(content["prompts"])
    arguments = PPOConfig(
        output_dir=output,
        per_device_train_batch_size=num_prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=1 if whole else num_prompts // content["minibatch"],
        num_ppo_epochs=1 if whole else content["epochs"],
        total_episodes=num_prompts * STEPS,
        num_sample_generations=0,
        response_length=content["response_length"],
        stop_token="eos",  # noqa: S106
        temperature=1.0,
        missing_eos_penalty=None,
        kl_coef=0.05,
        learning_rate=1e-6,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = Dataset.from_dict({"input_ids": content["prompts"]})

    def load(auto: Any, name: str) -> Any:
        return auto.from_pretrained(folder / name, dtype=torch.float32)

    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, "policy"),
        ref_model=load(AutoModelForCausalLM, "policy"),
        reward_model=load(AutoModelForSequenceClassification, "reward"),
        value_model=load(AutoModelForSequenceClassification, "reward"),
        train_dataset=rows,
        eval_dataset=rows,
    )


def keep_gradients(trainer: PPOTrainer, path: Path) -> None:
    """Makes the first optimizer step write losses, advantages and gradients, and stop."""
    kept: dict[str, Any] = {}
    whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward
    forward = ppo_trainer.forward

    def whitened(*arguments: Any, **options: Any) -> Any:
        kept["advantages"] = whiten(*arguments, **options)
        return kept["advantages"]

    def forwarded(model: Any, ids: Any, pad: int) -> Any:
        kept["ids"] = ids
        return forward(model, ids, pad)

    def gone_backward(loss: Any) -> None:
        backward(loss)
        kept["loss"] = float(loss)
        for name in ("policy", "value_model"):
            for key, weight in getattr(trainer.model, name).named_parameters():
                if weight.grad is not None:
                    kept[f"{name}.{key}"] = weight.grad
        torch.save(kept, path)
        sys.exit()

    ppo_trainer.masked_whiten, ppo_trainer.forward = whitened, forwarded
    trainer.accelerator.backward = gone_backward


def main() -> None:
    """Trains until standard input ends; the library's own words go to standard error."""
    folder, threads, precision = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    gradients = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    content = json.loads((folder / "workload.json").read_text())
    phases = Phases(content, answers=answers)
    with tempfile.TemporaryDirectory() as output:
        whole = gradients is not None
        trainer = build(folder, content, output=output, whole=whole, precision=precision)
        trainer.add_callback(phases)
        trainer.log = phases.logged
        if gradients is not None:
            np.random.permutation = np.arange
            keep_gradients(trainer, gradients)
        elif not sys.stdin.readline():
            return
        trainer.train()


if __name__ == "__main__":
    main()
