"""What saved policies are worth: gold win rate and variety against the SFT model's replies."""

import json
from pathlib import Path
from typing import Any

from benchmarks.time_to_quality.snapshots import SECONDS
from pipeline.evaluation import diversity, statistics
from pipeline.evaluation.gold import gold_scores
from pipeline.evaluation.sampling import Sampling, sample
from pipeline.models import load_causal_lm, load_tokenizer
from pipeline.ppo.inputs import read_prompts
from pipeline.spacing import evenly_spaced

SEED = 7
"""Of the sampled replies: none that a stage draws from."""


class Judge:
    """Compares replies to validation prompts, one each, with those of the SFT model."""

    def __init__(self, run: Path, *, num_prompts: int, max_tokens: tuple[int, int]) -> None:
        """Takes a run's folder, and the most tokens of a prompt and of a reply."""
        self.tokenizer = load_tokenizer(run / "sft")
        prompts = read_prompts(
            run / "data", split="validation", tokenizer=self.tokenizer, max_tokens=max_tokens[0]
        ).tokens
        self.prompts = [prompts[row] for row in evenly_spaced(len(prompts), num_prompts)]
        self.sampling = Sampling(seed=SEED, max_response_tokens=max_tokens[1], workers=2)
        self.sft = self.replies(run / "sft")

    def replies(self, folder: Path) -> list[str]:
        """Returns what the policy of a folder says; the uniform numbers are always the same."""
        replies = sample(
            load_causal_lm(folder),
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            rows=range(len(self.prompts)),
            draw=0,
            sampling=self.sampling,
        )
        return [reply.text for reply in replies]

    def figures(self, folder: Path) -> dict[str, float]:
        """Returns the gold win rate of a folder's policy and its distinct-2 as a share of SFT's."""
        texts = self.replies(folder)
        wins = statistics.outcomes(gold_scores(texts), gold_scores(self.sft))
        counts = [diversity.bigrams(each) for each in (texts, self.sft)]
        size = min(count.total() for count in counts)
        ours, theirs = (diversity.distinct_2(count, size=size) for count in counts)
        return {"gold_win_rate": float(wins.mean()), "distinct_2": ours / theirs}

    def curve(self, folder: Path) -> list[dict[str, Any]]:
        """Returns the figures of all policies that a trainer left in a folder."""
        saved = json.loads((folder / SECONDS).read_text())
        return [{**each, **self.figures(folder / f"{number}")} for number, each in enumerate(saved)]
