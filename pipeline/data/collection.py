"""What the data stage collects: rows by type and split, and the ledger of where they came from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.batches import Batch, batches_of, write_batches
from pipeline.data.formats import rows_file, texts_of
from pipeline.data.sources import Source
from pipeline.data.splits import SPLITS
from pipeline.data.tables import Row, parquet_rows
from pipeline.errors import UserError


@dataclass
class Collection:
    """Rows by type and split, the source of each type, and figures about the raw data.

    Rows are written as they are added and read again where they are needed.
    """

    folder: Path
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    source_of: dict[str, Source] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)

    def has(self, *row_types: str) -> bool:
        """Whether rows of all these types were added."""
        return all(row_type in self.counts for row_type in row_types)

    def require_rows(self, *row_types: str) -> None:
        """Raises UserError, which tells what was dropped, where a type has no training rows."""
        for row_type in row_types:
            if not self.counts[row_type]["train"]:
                dropped = self.source_of[row_type].dropped
                reasons = ", ".join(f"{why}: {count}" for why, count in sorted(dropped.items()))
                raise UserError(
                    f"no {row_type} are left to train on (dropped: {reasons or 'none'}); bring "
                    "more data, or loosen what drops them"
                )

    def add(self, row_type: str, rows: Mapping[str, Iterable[Row]], *, source: Source) -> None:
        """Writes the rows of one type and counts them for their source."""
        batches = {split: batches_of(given) for split, given in rows.items()}
        self.add_batches(row_type, batches, source=source)

    def add_batches(
        self, row_type: str, batches: Mapping[str, Iterable[Batch]], *, source: Source
    ) -> None:
        """Does the same with rows that are Arrow batches already."""
        self.source_of[row_type] = source
        self.counts[row_type] = {}
        for split in SPLITS:
            path = rows_file(self.folder, row_type, split=split)
            num_rows = write_batches(path, batches.get(split, ()))
            self.counts[row_type][split] = num_rows
            source.count(row_type, split=split, num_rows=num_rows)

    def rows(self, row_type: str) -> dict[str, Iterator[Row]]:
        """Returns the rows of one type by split, read from their files as they are asked for."""
        return {
            split: parquet_rows(rows_file(self.folder, row_type, split=split))
            for split, num_rows in self.counts.get(row_type, {}).items()
            if num_rows
        }

    def training_prompts(self) -> Iterator[str]:
        """Returns the text of every training prompt (of a conversation: its last turn)."""
        return (texts_of(row["prompt"])[-1] for row in self.rows("prompts")["train"])

    def ledger(self) -> list[dict[str, Any]]:
        """Returns what sources.json holds: one entry per source."""
        distinct = {id(source): source for source in self.source_of.values()}
        return [source.as_json() for source in distinct.values()]

    def metrics(self) -> dict[str, float]:
        """Returns the row counts as metrics."""
        return {
            f"{row_type}/{split}_rows": float(number)
            for row_type, by_split in self.counts.items()
            for split, number in by_split.items()
        }

    def summary(self) -> dict[str, Any]:
        """Returns the headline figures: row counts, figures of the raw data, drops by reason."""
        dropped: dict[str, int] = {}
        for entry in self.ledger():
            dropped |= entry["dropped"]
        return {"rows": self.counts, "dropped": dropped, **self.figures}

    def headline(self) -> str:
        """Returns the stage's result in a few words."""
        words = [f"{number:,} {name.replace('_', ' ')}" for name, number in self.figures.items()]
        pairs = sum(self.counts.get("instructions", {}).values())
        return ", ".join([*words, f"{pairs:,} pairs"])
