"""What the data stage collects: rows by type and split, and the ledger of where they came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.formats import texts_of
from pipeline.data.sources import Source
from pipeline.data.splits import SPLITS
from pipeline.data.tables import Row
from pipeline.errors import UserError


@dataclass
class Collection:
    """Rows by type and split, the source of each type, and figures about the raw data."""

    rows: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    source_of: dict[str, Source] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)

    def has(self, *row_types: str) -> bool:
        """Whether rows of all these types were added."""
        return all(row_type in self.rows for row_type in row_types)

    def require_rows(self, *row_types: str) -> None:
        """Raises UserError, which tells what was dropped, where a type has no training rows."""
        for row_type in row_types:
            if not self.rows[row_type]["train"]:
                dropped = self.source_of[row_type].dropped
                reasons = ", ".join(f"{why}: {count}" for why, count in sorted(dropped.items()))
                raise UserError(
                    f"no {row_type} are left to train on (dropped: {reasons or 'none'}); bring "
                    "more data, or loosen what drops them"
                )

    def add(self, row_type: str, rows: Mapping[str, Sequence[Row]], *, source: Source) -> None:
        """Takes the rows of one type and counts them for their source."""
        self.rows[row_type] = {split: list(rows.get(split, ())) for split in SPLITS}
        self.source_of[row_type] = source
        for split in SPLITS:
            source.count(row_type, split=split, num_rows=len(self.rows[row_type][split]))

    def training_prompts(self) -> list[str]:
        """Returns the text of every training prompt (of a conversation: its last turn)."""
        return [texts_of(row["prompt"])[-1] for row in self.rows["prompts"]["train"]]

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of rows by type and split."""
        return {
            row_type: {split: len(rows) for split, rows in by_split.items()}
            for row_type, by_split in self.rows.items()
        }

    def ledger(self) -> list[dict[str, Any]]:
        """Returns what sources.json holds: one entry per source."""
        distinct = {id(source): source for source in self.source_of.values()}
        return [source.as_json() for source in distinct.values()]

    def metrics(self) -> dict[str, float]:
        """Returns the row counts as metrics."""
        return {
            f"{row_type}/{split}_rows": float(number)
            for row_type, by_split in self.counts().items()
            for split, number in by_split.items()
        }

    def summary(self) -> dict[str, Any]:
        """Returns the headline figures: row counts, figures of the raw data, drops by reason."""
        dropped: dict[str, int] = {}
        for entry in self.ledger():
            dropped |= entry["dropped"]
        return {"rows": self.counts(), "dropped": dropped, **self.figures}

    def headline(self) -> str:
        """Returns the stage's result in a few words."""
        words = [f"{number:,} {name.replace('_', ' ')}" for name, number in self.figures.items()]
        pairs = sum(len(rows) for rows in self.rows.get("instructions", {}).values())
        return ", ".join([*words, f"{pairs:,} pairs"])
