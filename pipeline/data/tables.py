"""Parquet files of rows: read by one function, and held against the form of their type."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, first_line
from pipeline.manifest import mending_command

Row = dict[str, Any]

READ_ROWS = 4096
"""Rows of a Parquet file that are read at one time."""


def parquet_rows(path: Path) -> Iterator[Row]:
    """Returns the rows of a Parquet file, few of which are in memory at one time.

    Raises:
        UserError: it is no Parquet file, is damaged, or holds values that Python has not.
    """
    from pyarrow import parquet

    with _readable(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(READ_ROWS):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the file
        raise UserError(
            f"{path} is not a Parquet file that can be read ({first_line(error)})"
        ) from error


def stage_rows(path: Path, row_type: str) -> Iterator[Row]:
    """Returns the rows of a file that the data stage wrote: text, instructions or prompts.

    Raises:
        UserError: it is damaged, or a row has not the form of its type.
    """
    for number, row in enumerate(parquet_rows(path)):
        if not any(_fits(row, form) for form in FORMS[row_type]):
            mend = f"{mending_command(path.parent)} FORCE=1"
            raise UserError(f"{path} row {number} is no row of {row_type}. Run: {mend}")
        yield row


Form = Mapping[str, Callable[[Any], bool]]


def _fits(row: Row, form: Form) -> bool:
    return all(holds(row.get(name)) for name, holds in form.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict) and _is_text(value.get("role")) and _is_text(value.get("content"))
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_said(value: Any) -> bool:
    return _is_text(value) or _is_message(value) or _is_conversation(value)


FORMS: Mapping[str, tuple[Form, ...]] = {
    "text": ({"messages": _is_conversation}, {"text": _is_text}),
    "instructions": ({"messages": _is_conversation}, {"prompt": _is_said, "completion": _is_said}),
    "prompts": ({"prompt": _is_said},),
}
"""What a row of a type holds, one form or another."""
