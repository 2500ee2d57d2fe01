"""Where raw data comes from: pinned packages, or our generator; and the ledger of what was kept."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline.data import synthetic
from pipeline.data.packages import CHITCHAT, HUTTO, Package, fetch, read_tar, read_zip
from pipeline.data.ratings import FOLDER, RESOURCE, RatedText, file_names, parse_ratings

CHITCHAT_FILE = "chitchat_dataset/dataset.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One origin of rows: what sources.json says about it."""

    origin: str
    version: str
    sha256: str
    licence: str
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, row_type: str, *, split: str, num_rows: int) -> None:
        """Records how many rows of a type the source gave to a split."""
        self.rows.setdefault(row_type, {})[split] = num_rows

    def drop(self, row_type: str, dropped: Counter[str]) -> None:
        """Records how many rows of a type were dropped, by reason."""
        self.dropped.update({f"{row_type}: {reason}": count for reason, count in dropped.items()})

    def as_json(self) -> dict[str, Any]:
        """Returns the source's entry in sources.json."""
        return {
            "origin": self.origin,
            "version": self.version,
            "sha256": self.sha256,
            "licence": self.licence,
            "rows": self.rows,
            "dropped": dict(sorted(self.dropped.items())),
        }


def chats(*, is_synthetic: bool, conversations: int, seed: int) -> tuple[bytes, Source]:
    """Returns a `dataset.json` of conversations and its ledger."""
    if is_synthetic:
        return synthetic.chats(conversations=conversations, seed=seed), _made_up("chats")
    return read_zip(fetch(CHITCHAT), CHITCHAT_FILE), _packaged(CHITCHAT)


def ratings(
    sets: tuple[str, ...], *, is_synthetic: bool, texts: int, seed: int
) -> tuple[list[RatedText], Source]:
    """Returns the rated texts of the named sets and their ledger."""
    if is_synthetic:
        source = _made_up("ratings")
        files = {name: synthetic.ratings(name, texts=texts, seed=seed) for name in sets}
    else:
        source = _packaged(HUTTO)
        inner = read_tar(fetch(HUTTO), RESOURCE)
        files = {name: _files(inner, name) for name in sets}
    parsed = [
        parse_ratings(name, texts=given[0], ratings=given[1]) for name, given in files.items()
    ]
    return [item for items in parsed for item in items], source


def _files(archive: bytes, name: str) -> tuple[bytes, bytes]:
    texts, ratings = file_names(name)
    return read_tar(archive, f"{FOLDER}/{texts}"), read_tar(archive, f"{FOLDER}/{ratings}")


def _packaged(package: Package) -> Source:
    return Source(
        origin=f"PyPI: {package.name} {package.archive}",
        version=package.version,
        sha256=package.sha256,
        licence=package.licence,
    )


def _made_up(what: str) -> Source:
    return Source(
        origin=f"made-up {what} (pipeline/data/synthetic.py)",
        version="1",
        sha256="",
        licence="Apache-2.0",
    )
