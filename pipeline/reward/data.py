"""Rankings and pairs from the data folder, as the trainer's features and batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.formats import check_row, read_rows, texts_of
from pipeline.errors import UserError
from pipeline.models import pad_right
from pipeline.reward.loss import comparisons, rater_targets
from pipeline.reward.packing import pack_texts, padding_frac
from pipeline.reward.reading import Reading
from pipeline.sequences import by_length
from pipeline.streams import stream

TEXTS_PER_CHUNK = 16
"""Texts of one forward pass where they are not packed: few enough to be of about one length."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """K rated texts of one kind; a pair is a ranking of two."""

    scale: str
    """Texts of the same scale are comparable: a whole set that raters rated alike, or a row."""
    group: str
    """Rows of the same group come from one document, and are no independent evidence."""
    set: str
    """Name the report shows the texts under."""
    prompts: list[Any]
    """Prompt of each response: a string or a list of messages."""
    responses: list[str]
    """The rated texts."""
    scores: list[float]
    """Mean rating of each text."""
    ratings: list[list[int]] | None
    """Every rater's rating of each text, where they are known."""


def read_rankings(folder: Path, row_type: str, *, split: str) -> list[Ranking]:
    """Returns the rankings and pairs of a data folder's split.

    Raises:
        UserError: there are none, or a row is malformed; the row is named.
    """
    rankings = []
    for index, row in enumerate(read_rows(folder, row_type, split=split)):
        where = f"{folder / row_type}-{split}.parquet row {index}"
        present = {name: value for name, value in row.items() if value is not None}
        checked = check_row(present, row_type, where=where)
        read = _ranking if "responses" in checked else _pair
        rankings.append(read(checked, where))
    return rankings


def _ranking(row: dict[str, Any], where: str) -> Ranking:
    """Texts with individual ratings share their set's scale; others compare within the row."""
    rated = all(row["ratings"])
    return Ranking(
        scale=row["set"] if rated else where,
        group=row["group"],
        set=row["set"],
        prompts=row["prompts"] * len(row["responses"]),
        responses=row["responses"],
        scores=row["scores"],
        ratings=row["ratings"] if rated else None,
    )


def _pair(row: dict[str, Any], where: str) -> Ranking:
    margin = row.get("margin", 1.0)
    if not margin > 0:
        raise UserError(f"{where}: margin must be above 0, got {margin}")
    return Ranking(
        scale=where,
        group=row["group"],
        set="pairs",
        prompts=[row["prompt"]] * 2,
        responses=[texts_of(row[name])[0] for name in ("chosen", "rejected")],
        scores=[margin, 0.0],
        ratings=None,
    )


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Rankings with the token ids of each prompt + response, EOS last."""

    rankings: list[Ranking]
    """Rankings of the texts that fit, each of at least two."""
    sequences: list[list[list[int]]]
    """Token ids of every text of every ranking."""
    lowered: list[list[list[int]]]
    """The same with the response in lower case."""
    starts: list[list[int]]
    """Place of the first response token in each of them."""
    num_dropped: int
    """Texts that are longer than allowed, or were left alone in their ranking."""

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of all texts, ranking after ranking."""
        return [ids for sequences in self.sequences for ids in sequences]


def encode(rankings: Sequence[Ranking], *, reading: Reading, max_length: int) -> Encoded:
    """Returns the rankings as a model reads them, without texts longer than max_length tokens."""
    kept, encoded, lowered, starts, num_texts = [], [], [], [], 0
    for ranking in rankings:
        num_texts += len(ranking.responses)
        texts = list(zip(ranking.prompts, ranking.responses, strict=True))
        exchanges = [reading.exchange(*text) for text in texts]
        fitting = [index for index, one in enumerate(exchanges) if len(one.ids) <= max_length]
        if len(fitting) >= 2:
            kept.append(_only(ranking, fitting))
            encoded.append([exchanges[index].ids for index in fitting])
            lowered.append([_lowered(texts[i], exchanges[i].ids, reading) for i in fitting])
            starts.append([exchanges[index].start for index in fitting])
    num_kept = sum(map(len, encoded))
    return Encoded(
        rankings=kept,
        sequences=encoded,
        lowered=lowered,
        starts=starts,
        num_dropped=num_texts - num_kept,
    )


def _lowered(text: tuple[Any, str], ids: list[int], reading: Reading) -> list[int]:
    """Returns a text's token ids in lower case, or as it is where that would take more tokens."""
    prompt, response = text
    lower = reading.exchange(prompt, response.lower()).ids
    return lower if len(lower) <= len(ids) else ids


def _only(ranking: Ranking, indices: Sequence[int]) -> Ranking:
    def pick(values: list[Any]) -> list[Any]:
        return [values[index] for index in indices]

    return replace(
        ranking,
        prompts=pick(ranking.prompts),
        responses=pick(ranking.responses),
        scores=pick(ranking.scores),
        ratings=ranking.ratings and pick(ranking.ratings),
    )


def features(encoded: Encoded, *, min_gap: float, soft: bool) -> list[dict[str, Any]]:
    """Returns the trainer's rows: of each ranking token ids, and comparisons if it has any.

    Args:
        encoded: rankings in tokens.
        min_gap: least difference of mean ratings that makes a comparison.
        soft: targets are the raters' distribution; else the better text wins with probability 1.
    """
    rows = []
    for ranking, sequences, lowered, starts in zip(
        encoded.rankings, encoded.sequences, encoded.lowered, encoded.starts, strict=True
    ):
        better, worse = comparisons(torch.tensor(ranking.scores), min_gap=min_gap)
        targets = torch.ones(len(better))
        if soft and ranking.ratings is not None:
            targets = rater_targets(ranking.ratings, better=better, worse=worse)
        if len(better):
            row = {"sequences": sequences, "lowered": lowered, "starts": starts}
            rows.append(row | {"better": better, "worse": worse, "targets": targets})
    return rows


def mean_padding_frac(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the mean share of empty positions of packed rankings, responses not varied.

    Args:
        rows: rows of `features`, at least one.
    """
    fracs = []
    for row in rows:
        pairs = list(zip(row["sequences"], row["starts"], strict=True))
        prompts, texts = (
            [ids[:start] for ids, start in pairs],
            [ids[start:] for ids, start in pairs],
        )
        fracs.append(padding_frac(prompts, texts))
    return sum(fracs) / len(fracs)


@dataclass(frozen=True, kw_only=True)
class TrainingRankings:
    """The trainer's rows in the order they are read, their responses varied at random.

    What is varied is a function of the seed and the place in the order alone: the same on one
    process or several, and after an interruption.
    """

    rows: list[dict[str, Any]]
    """Rows of `features`."""
    order: list[int]
    """Index of the row at each place."""
    token_dropout: float
    """Probability that a response token is left out; EOS stays."""
    lowercase_frac: float
    """Probability that a response is read in lower case."""
    seed: int
    """Seed of what is varied."""

    def __len__(self) -> int:
        """Returns the number of places."""
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Returns the row at a place."""
        row = self.rows[self.order[place]]
        generator = np.random.default_rng((stream(self.seed, "augmentation"), place))
        lower = generator.random(len(row["starts"])) < self.lowercase_frac
        texts = zip(row["sequences"], row["lowered"], lower, row["starts"], strict=True)
        sequences = [
            self._thinned(lowered if low else ids, start, generator)
            for ids, lowered, low, start in texts
        ]
        return row | {"sequences": sequences}

    def _thinned(self, ids: list[int], start: int, generator: np.random.Generator) -> list[int]:
        kept = generator.random(len(ids)) >= self.token_dropout
        kept[:start] = kept[-1] = True
        return [token for token, stays in zip(ids, kept, strict=True) if stays]


@dataclass(frozen=True, kw_only=True)
class RankingCollator:
    """Makes one batch of rankings: their texts, packed into rows or whole, and all comparisons.

    `labels` are the targets under the name by which the Trainer counts what a loss is divided by,
    over gradient accumulation and over processes: one label is one comparison.
    """

    pad_id: int
    """Token id of the padding."""
    packed: bool = True
    """Whether texts stand side by side in rows that begin with their prompt."""
    separator: int | None = None
    """Token that ends the first segment of a pair; None without segments."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the texts as `ranking_scores` reads them, and comparisons of their places."""
        texts: list[list[int]] = []
        starts: list[int] = []
        better, worse = [], []
        for row in rows:
            better.append(row["better"] + len(texts))
            worse.append(row["worse"] + len(texts))
            texts += row["sequences"]
            starts += row["starts"]
        comparisons = {
            "better": torch.cat(better),
            "worse": torch.cat(worse),
            "labels": torch.cat([row["targets"] for row in rows]),
        }
        return comparisons | (self._rows(texts, starts) if self.packed else self._chunks(texts))

    def _rows(self, texts: list[list[int]], starts: list[int]) -> dict[str, Any]:
        packed = pack_texts(
            [ids[:start] for ids, start in zip(texts, starts, strict=True)],
            [ids[start:] for ids, start in zip(texts, starts, strict=True)],
            pad_id=self.pad_id,
        )
        return {"rows": packed.inputs(), "last": packed.last}

    def _chunks(self, texts: list[list[int]]) -> dict[str, Any]:
        """Returns the texts in chunks of about one length, and each text's place in them."""
        chunks = by_length([len(ids) for ids in texts], batch_size=TEXTS_PER_CHUNK)
        place = torch.empty(len(texts), dtype=torch.long)
        place[torch.tensor([index for chunk in chunks for index in chunk])] = torch.arange(
            len(texts)
        )
        padded = [
            pad_right(
                [texts[index] for index in chunk], pad_id=self.pad_id, separator=self.separator
            )
            for chunk in chunks
        ]
        return {"chunks": padded, "place": place}
