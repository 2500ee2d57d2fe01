"""Prompts: each split's distinct ones, without those an earlier split has seen."""

from collections import Counter
from collections.abc import Iterable, Mapping

from pipeline.data.cleaning import normalise
from pipeline.data.formats import row_texts, texts_of
from pipeline.data.splits import SPLITS
from pipeline.data.tables import Row


def prompts_of(
    rows: Mapping[str, Iterable[Row]], *, texts: Mapping[str, Iterable[Row]]
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Returns the prompt rows by split, and how many were dropped by reason.

    A prompt is dropped where its normalised text is an earlier prompt of its own split, or occurs
    in an earlier split ("how are you?" is in all of them) as a prompt or as any other turn.

    Args:
        rows: rows with `prompt` and `group`, by split.
        texts: text rows by split, whose turns count as seen.
    """
    prompts: dict[str, list[Row]] = {}
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for split in SPLITS:
        own: dict[str, Row] = {}
        for row in rows.get(split, ()):
            key = _key(row)
            reason = _reason(key, own=own, seen=seen, split=split)
            if reason is None:
                own[key] = {"prompt": row["prompt"], "group": row["group"]}
            else:
                dropped[reason] += 1
        prompts[split] = list(own.values())
        seen |= own.keys()
        seen |= {normalise(text) for row in texts.get(split, ()) for text in row_texts(row)}
    return prompts, dropped


def _reason(key: str, *, own: Mapping[str, Row], seen: set[str], split: str) -> str | None:
    if key in seen:
        return f"a {split} prompt occurs in an earlier split"
    if key in own:
        return f"a {split} prompt is a repetition"
    return None


def _key(row: Row) -> str:
    return normalise(" ".join(texts_of(row["prompt"])))
