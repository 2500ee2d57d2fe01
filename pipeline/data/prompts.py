"""Prompts: each split's distinct ones, without those an earlier split has seen."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pipeline.data.cleaning import normalise
from pipeline.data.formats import row_texts, texts_of
from pipeline.data.splits import SPLITS
from pipeline.data.tables import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def kept_prompts(
    rows: Mapping[str, Iterable[Row]], *, texts: Mapping[str, Iterable[Row]]
) -> tuple[dict[str, "NDArray[np.bool_]"], Counter[str]]:
    """Returns which rows' prompts are kept, by split, and how many are dropped by reason.

    A prompt is dropped where its normalised text is an earlier prompt of its own split, or occurs
    in an earlier split ("how are you?" is in all of them) as a prompt or as any other turn. Texts
    are known by 64 bits of their hashes: a row takes eight bytes, and of ten million different
    texts two share their bits once in 400,000 runs.

    Args:
        rows: rows with `prompt`, by split.
        texts: rows of other types by split, whose turns and prompts count as seen.
    """
    import numpy as np

    kept: dict[str, NDArray[np.bool_]] = {}
    dropped: Counter[str] = Counter()
    seen = np.empty(0, np.uint64)
    for split in SPLITS:
        prompts = (" ".join(texts_of(row["prompt"])) for row in rows.get(split, ()))
        said = (text for row in texts.get(split, ()) for text in _seen_in(row))
        keys = _keys(prompts)
        is_seen, is_first = np.isin(keys, seen), np.zeros(len(keys), np.bool_)
        is_first[np.unique(keys, return_index=True)[1]] = True
        kept[split] = is_first & ~is_seen
        dropped[f"a {split} prompt occurs in an earlier split"] = int(is_seen.sum())
        dropped[f"a {split} prompt is a repetition"] = int((~is_first & ~is_seen).sum())
        if split != SPLITS[-1]:
            seen = np.unique(np.concatenate([seen, keys, _keys(said)]))
    return kept, +dropped


def _seen_in(row: Row) -> list[str]:
    """Returns every turn of a row, and its prompt as a whole."""
    prompts = [row["prompt"]] if "prompt" in row else row.get("prompts", [])
    return [*row_texts(row), *(" ".join(texts_of(prompt)) for prompt in prompts)]


def prompt_row(row: Row) -> Row:
    """Returns the prompt of a row as a row of its own."""
    return {"prompt": row["prompt"], "group": row["group"]}


def _keys(texts: Iterable[str]) -> "NDArray[np.uint64]":
    import numpy as np

    digests = (hashlib.blake2b(normalise(text).encode(), digest_size=8) for text in texts)
    return np.fromiter((int.from_bytes(digest.digest()) for digest in digests), np.uint64)
