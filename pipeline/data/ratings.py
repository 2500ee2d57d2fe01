"""The Hutto and Gilbert (2014) ratings: parsed, joined by id, grouped into rankings."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.cleaning import clean, has_marker, normalise
from pipeline.data.splits import SPLITS, Split, assign

FOLDER = "hutto_ICWSM_2014"
RESOURCE = f"vaderSentiment-3.3.2/additional_resources/{FOLDER}.tar.gz"
SETS = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
DOCUMENT_SETS = ("amazonReviewSnippets", "nytEditorialSnippets")
"""Sets whose ids are document_snippet: snippets of one document stay in one split."""


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """One text with everything its raters said, from -4 (bad) to 4 (good)."""

    set: str
    id: str
    text: str
    ratings: tuple[int, ...]

    @property
    def score(self) -> float:
        """Mean of the raw ratings (the means given in the files are partly rescaled)."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def group(self) -> str:
        """What must stay in one split: the document, or texts that read the same."""
        document = self.set in DOCUMENT_SETS
        return f"{self.set}/{self.id.split('_')[0] if document else normalise(self.text)}"


def file_names(name: str) -> tuple[str, str]:
    """Names of a set's two files: (id, mean, text) and (id, mean, sd, list of ratings)."""
    return f"{name}_GroundTruth.txt", f"{name}_anonDataRatings.txt"


def parse_ratings(name: str, *, texts: bytes, ratings: bytes) -> list[RatedText]:
    """Returns the set's rated texts in the order of the file of texts.

    Args:
        name: the set's name.
        texts: content of `<set>_GroundTruth.txt`, tab-separated, perhaps with a byte-order mark.
        ratings: content of `<set>_anonDataRatings.txt`; its last column is a JSON list.
    """
    by_id = {fields[0]: json.loads(fields[3]) for fields in _table(ratings, columns=4)}
    rows = _table(texts, columns=3)
    assert by_id.keys() == {fields[0] for fields in rows}, f"{name}: texts and ratings differ"
    return [
        RatedText(set=name, id=fields[0], text=clean(fields[2]), ratings=tuple(by_id[fields[0]]))
        for fields in rows
    ]


def split_rated(
    rated: Sequence[RatedText], split: Split, *, seed: int
) -> tuple[dict[str, list[RatedText]], Counter[str]]:
    """Returns the rated texts by split, and how many were dropped by reason.

    Groups decide the split; a held-out text that still reads like one of an earlier split (the
    same sentence in two documents) is dropped.
    """
    split_of = assign((item.group for item in rated), split, seed=seed)
    by_split: dict[str, list[RatedText]] = {name: [] for name in SPLITS}
    dropped: Counter[str] = Counter()
    seen: dict[str, str] = {}
    for item in sorted(rated, key=lambda item: SPLITS.index(split_of[item.group])):
        name = split_of[item.group]
        if not item.text or has_marker(item.text):
            dropped["empty, or a special token in the text"] += 1
        elif seen.setdefault(normalise(item.text), name) != name:
            dropped[f"a {name} text occurs in an earlier split"] += 1
        else:
            by_split[name].append(item)
    return by_split, dropped


def rankings(
    rated: Sequence[RatedText], prompts: Sequence[str], *, size: int, seed: int
) -> list[dict[str, Any]]:
    """Returns one row per `size` texts of one set, all replies to one prompt drawn from `prompts`.

    Texts are shuffled within their set. What is left over makes a smaller last row; a single
    left-over text joins the row before, for one text has nothing to be compared with (and a set
    of one text makes no row).
    """
    generator = random.Random(f"rankings {seed}")
    by_set: dict[str, list[RatedText]] = defaultdict(list)
    for item in rated:
        by_set[item.set].append(item)
    rows = []
    for name, items in by_set.items():
        generator.shuffle(items)
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            alone = chunks.pop()
            chunks[-1] = chunks[-1] + alone
        rows += [
            _ranking(name, chunk, generator.choice(prompts)) for chunk in chunks if len(chunk) > 1
        ]
    return rows


def _ranking(name: str, items: Sequence[RatedText], prompt: str) -> dict[str, Any]:
    return {
        "prompts": [prompt],
        "set": name,
        "group": name,
        "ids": [item.id for item in items],
        "responses": [item.text for item in items],
        "scores": [item.score for item in items],
        "ratings": [list(item.ratings) for item in items],
    }


def _table(content: bytes, *, columns: int) -> list[list[str]]:
    lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    rows = [line.split("\t") for line in lines if line.strip()]
    assert all(len(row) == columns for row in rows), f"expected {columns} columns"
    return rows
