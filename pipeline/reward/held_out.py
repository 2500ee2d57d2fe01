"""The report on held-out texts: what the model, the bag of words and the raters say of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from pipeline.reward.baseline import bag_of_words_scores
from pipeline.reward.data import Encoded, Ranking, encode, read_rankings
from pipeline.reward.reading import Reading
from pipeline.reward.report import RatedSet, reward_report
from pipeline.reward.scores import raw_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a reward model was trained to do, by the names of its stage's settings."""

    row_type: str
    """preferences or guard_preferences."""
    max_length: int
    """Longer texts are left out, as in training; the bag of words learns from the same texts."""
    report_gap: float
    """Least difference of mean ratings of a pair that counts."""
    labels: str
    """hard or raters: what the model learned to predict, by which its calibration is judged."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Trained":
        """Returns what the settings of a reward model's stage say."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


def held_out_report(
    model: "PreTrainedModel",
    *,
    reading: Reading,
    data: Path,
    split: str,
    trained: Trained,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the report on a split's texts, bag of words and human ceiling included.

    Every process must call it: they share the texts to be scored.

    Args:
        model: a reward model; its raw scores are used.
        reading: how the model reads text.
        data: folder of the data stage.
        split: validation for choices; test is read by `evaluate` alone.
        trained: what the model was trained to do.
        seed: seed of the bootstrap and of the baseline's sample of comparisons.
    """
    training, held_out = (
        encode(
            read_rankings(data, trained.row_type, split=name),
            reading=reading,
            max_length=trained.max_length,
        )
        for name in ("train", split)
    )
    min_gap, soft = trained.report_gap, trained.labels == "raters"
    scores = raw_scores(
        model,
        held_out.texts,
        pad_id=reading.tokenizer.pad_token_id,
        separator=reading.separator,
    )
    sets = rated_sets(
        held_out, scores=scores, training=training.rankings, min_gap=min_gap, seed=seed
    )
    report = reward_report(sets, min_gap=min_gap, soft=soft, seed=seed)
    return {"split": split, **report}


def rated_sets(
    held_out: Encoded,
    *,
    scores: Float[np.ndarray, " text"],
    training: list[Ranking] | None = None,
    min_gap: float = 0.5,
    seed: int = 0,
) -> dict[str, RatedSet]:
    """Returns the held-out texts by set, with the bag of words' scores where it can be trained.

    Args:
        held_out: rankings of the split.
        scores: raw score of every text, in the order of `held_out.texts`.
        training: rankings the bag of words learns from, each set from its own; None leaves it out.
        min_gap: least difference of mean ratings of the baseline's comparisons.
        seed: seed of the baseline's sample of comparisons.
    """
    ends = np.cumsum([len(ranking.responses) for ranking in held_out.rankings])
    parts = np.split(scores, ends[:-1])
    sets = {}
    for name in sorted({ranking.set for ranking in held_out.rankings}):
        members = [ranking for ranking in held_out.rankings if ranking.set == name]
        texts, ratings, scales = flat(members)
        learned = [ranking for ranking in training or [] if ranking.set == name]
        raters = [
            given
            for ranking in members
            for given in ranking.ratings or [[] for _ in ranking.responses]
        ]
        sets[name] = RatedSet(
            scores=np.concatenate(
                [part for part, r in zip(parts, held_out.rankings, strict=True) if r.set == name]
            ),
            ratings=ratings,
            lengths=np.array([float(len(text.split())) for text in texts]),
            scales=scales,
            groups=[ranking.group for ranking in members for _ in ranking.responses],
            baseline=_baseline(learned, texts, min_gap=min_gap, seed=seed) if learned else None,
            raters=raters if any(raters) else None,
        )
    return sets


def _baseline(
    learned: list[Ranking], held_out: list[str], *, min_gap: float, seed: int
) -> Float[np.ndarray, " text"] | None:
    texts, ratings, scales = flat(learned)
    return bag_of_words_scores(
        texts, ratings=ratings, scales=scales, held_out=held_out, min_gap=min_gap, seed=seed
    )


def flat(rankings: list[Ranking]) -> tuple[list[str], Float[np.ndarray, " text"], list[str]]:
    """Returns texts, mean ratings and scales of all rankings, ranking after ranking."""
    texts = [text for ranking in rankings for text in ranking.responses]
    ratings = np.array([score for ranking in rankings for score in ranking.scores])
    scales = [ranking.scale for ranking in rankings for _ in ranking.responses]
    return texts, ratings, scales
