"""The policy on validation prompts: always the same prompts and the same uniform numbers."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from pipeline.checkpoint import StageRun
from pipeline.evaluation.diversity import bigrams, distinct_2
from pipeline.ppo.advantages import sequence_sum
from pipeline.ppo.trainer import PPOTrainer
from pipeline.tokenizer import decode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES = 8
"""Responses kept in samples.jsonl at every look."""


class Validation:
    """Looks at the policy between updates; what it sees never trains.

    Attributes:
        looks: figures by the number of updates done.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        prompts: Sequence[list[int]],
        *,
        tokenizer: "PreTrainedTokenizerFast",
        text: Int[Tensor, "row time"] | None = None,
    ) -> None:
        """Takes prompts, and text whose first rows, one a prompt, show the alignment tax."""
        self.text = None if text is None else text[: len(prompts)]
        self.trainer, self.prompts, self.tokenizer = trainer, list(prompts), tokenizer
        self.looks: dict[int, dict[str, float]] = {}

    def look(self, stage: StageRun, *, update: int) -> None:
        """Logs the figures of the policy after so many updates."""
        trainer = self.trainer
        responses = trainer.sample(self.prompts, update=0, name="validation")
        experience = trainer.measure(self.prompts, responses)
        texts = [decode_response(self.tokenizer, response) for response in responses]
        counts = bigrams(texts)
        metrics = {
            "validation/score": float(experience.scores.mean()),
            "validation/kl": float(sequence_sum(experience.kl, experience.mask).mean()),
            "validation/length_tokens": float(experience.mask.sum(dim=1).float().mean()),
            "validation/eos_frac": float(experience.ended.float().mean()),
            "validation/distinct_2": distinct_2(counts, size=counts.total()),
        }
        if self.text is not None:
            metrics["validation/text_perplexity"] = trainer.text_perplexity(self.text)
        self.looks[update] = metrics
        stage.log(update, metrics)
        rows = zip(self.prompts, texts, experience.scores.tolist(), strict=True)
        stage.log_samples(
            update,
            [
                {"prompt": self.tokenizer.decode(prompt), "response": text, "score": score}
                for prompt, text, score in list(rows)[:SAMPLES]
            ],
        )

    def recall(self, stage: StageRun) -> None:
        """Takes up the figures that an interrupted run has logged."""
        lines = (stage.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            if "validation/score" in row:
                self.looks[row.pop("step")] = row
