"""The policy on validation prompts: always the same prompts and the same uniform numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from pipeline.checkpoint import StageRun
from pipeline.evaluation.diversity import bigrams, distinct_2
from pipeline.ppo.advantages import sequence_sum
from pipeline.ppo.guard import BEST, Look, Watch, keep_best, over_optimised
from pipeline.ppo.trainer import PPOTrainer, placed
from pipeline.spacing import evenly_spaced
from pipeline.tokenizer import decode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES = 8
"""Responses kept in samples.jsonl at every look."""
FIGURES = ("validation/", "guard/")
"""Groups of the metrics that a look consists of."""


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
        num_prompts: int,
        tokenizer: "PreTrainedTokenizerFast",
        watch: Watch | None = None,
        text: Int[Tensor, "row time"] | None = None,
    ) -> None:
        """Takes a split's prompts, and its text, which shows the alignment tax.

        Evenly spaced ones are read: num_prompts prompts, and a row of text for each.
        """
        self.prompts = [prompts[row] for row in evenly_spaced(len(prompts), num_prompts)]
        self.text = None if text is None else text[evenly_spaced(len(text), len(self.prompts))]
        self.trainer, self.tokenizer, self.watch = trainer, tokenizer, watch
        self.looks: dict[int, dict[str, float]] = {}

    @property
    def judged(self) -> dict[int, Look]:
        """The looks that the guard judged, by the number of updates done."""
        return {
            update: (figures["guard/score"], figures["validation/score"])
            for update, figures in self.looks.items()
            if "guard/score" in figures
        }

    @property
    def best(self) -> int | None:
        """Updates done when the guard's score was highest, the first of equals; None: no look."""
        judged = self.judged
        return max(judged, key=lambda update: judged[update][0], default=None)

    @property
    def ends(self) -> bool:
        """Whether training should end here, because the guard has seen over-optimisation."""
        looks = list(self.judged.values())
        return self.watch is not None and over_optimised(looks, patience=self.watch.patience)

    def look(self, stage: StageRun, *, update: int, judged: bool = False) -> dict[str, float]:
        """Returns the figures of the policy after so many updates; samples are logged.

        Args:
            stage: where samples go, and the policy that the guard likes best.
            update: updates done.
            judged: whether the guard judges this look.
        """
        trainer = self.trainer
        sampled = trainer.sample(self.prompts, update=0, name="validation")
        responses = sampled.responses
        with placed(f"validation after update {update}"):
            experience = trainer.measure(self.prompts, sampled)
        texts = [decode_response(self.tokenizer, response) for response in responses]
        counts = bigrams(texts)
        metrics = {
            "validation/score": float(experience.scores.mean()),
            "validation/kl": float(sequence_sum(experience.kl, experience.mask).mean()),
            "validation/length_tokens": float(experience.mask.sum(dim=1).float().mean()),
            "validation/eos_frac": float(experience.ended.float().mean()),
            "validation/distinct_2": distinct_2(counts, size=counts.total()),
        }
        if self.watch is not None and judged:
            metrics["guard/score"] = self.watch.judge(self.prompts, responses)
        if self.text is not None:
            metrics["validation/text_perplexity"] = trainer.text_perplexity(self.text)
        self.looks[update] = metrics
        if self.best == update:
            keep_best(trainer, tokenizer=self.tokenizer, folder=stage.path / BEST)
        rows = zip(self.prompts, texts, experience.scores.tolist(), strict=True)
        stage.log_samples(
            update,
            [
                {"prompt": self.tokenizer.decode(prompt), "response": text, "score": score}
                for prompt, text, score in list(rows)[:SAMPLES]
            ],
        )
        return metrics

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the figures that an interrupted run has logged."""
        for row in rows:
            if "validation/score" in row:
                self.looks[int(row["step"])] = {
                    name: value for name, value in row.items() if name.startswith(FIGURES)
                }
