"""Reads a source by the adapter of its schema: rows of our types, and why others were dropped."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.adapters import alpaca, hh, oasst, sharegpt, tldr, ultrafeedback
from pipeline.data.adapters.turns import UnusableError, WrongSchemaError
from pipeline.data.tables import Row
from pipeline.errors import UserError

Placed = tuple[str, Any]
"""File and line, and what stands there."""
Convert = Callable[[Row, str, Counter[str]], Iterator[Row]]
"""A foreign row, the type of the rows that are wanted, and a count of parts that are left out."""

OTHER_LANGUAGE = "documents in another language"
SPOKEN = ("text", "instructions", "prompts")
COMPARED = (*SPOKEN, "preferences", "guard_preferences")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How the rows of one schema become ours."""

    columns: str
    """What a row of the schema holds, for the message that refuses another."""
    gives: tuple[str, ...]
    """Row types that can be made of it."""
    convert: Convert
    """Makes our rows of one of its rows."""
    gather: Callable[[Iterable[Placed], Counter[str]], Iterator[Placed]] | None = None
    """Puts rows together that make one document; None where each row is one."""
    language: Callable[[Row], str] | None = None
    """Tells the language of a document; None where the schema does not."""


def _alone(rows: Callable[[Row, str], Iterator[Row]]) -> Convert:
    """An adapter's function that leaves out no parts of a row."""
    return lambda row, row_type, _: rows(row, row_type)


ADAPTERS: Mapping[str, Adapter] = {
    "hh": Adapter(columns=hh.COLUMNS, gives=COMPARED, convert=_alone(hh.rows)),
    "tldr": Adapter(columns=tldr.COLUMNS, gives=COMPARED, convert=_alone(tldr.rows)),
    "ultrafeedback": Adapter(
        columns=ultrafeedback.COLUMNS, gives=COMPARED, convert=_alone(ultrafeedback.rows)
    ),
    "sharegpt": Adapter(columns=sharegpt.COLUMNS, gives=SPOKEN, convert=sharegpt.rows),
    "alpaca": Adapter(columns=alpaca.COLUMNS, gives=SPOKEN, convert=_alone(alpaca.rows)),
    "oasst": Adapter(
        columns=oasst.COLUMNS,
        gives=COMPARED,
        convert=oasst.rows,
        gather=oasst.trees,
        language=oasst.language,
    ),
}
"""The schemas that a source may name."""


def adapted(
    placed: Iterable[Placed],
    schema: str,
    row_type: str,
    *,
    languages: tuple[str, ...],
    dropped: Counter[str],
) -> Iterator[tuple[str, Row]]:
    """Returns the rows of our type that foreign rows hold, each with the place it comes from.

    Args:
        placed: rows of the source.
        schema: name of their schema.
        row_type: type of the rows that are wanted.
        languages: languages that are kept; all where none is named.
        dropped: counts what is left out, by reason.

    Raises:
        UserError: a row is not of that schema; the message names its place and the columns.
    """
    adapter = ADAPTERS[schema]
    where = ""
    try:
        objects = _objects(placed)
        for where, row in adapter.gather(objects, dropped) if adapter.gather else objects:
            if languages and adapter.language and adapter.language(row) not in languages:
                dropped[OTHER_LANGUAGE] += 1
                continue
            try:
                for made in adapter.convert(row, row_type, dropped):
                    yield where, made
            except UnusableError as reason:
                dropped[str(reason)] += 1
    except WrongSchemaError as error:
        raise UserError(
            f"{error.where or where}: {error}; {schema} needs {adapter.columns}"
        ) from error


def _objects(placed: Iterable[Placed]) -> Iterator[tuple[str, Row]]:
    for where, row in placed:
        if not isinstance(row, dict):
            message = f"expected an object with columns, got {type(row).__name__}"
            raise WrongSchemaError(message, where=where)
        yield where, row
