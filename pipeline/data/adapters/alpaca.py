"""Alpaca: an instruction, perhaps an input that it is about, and the reply to both.

    {"instruction": text, "input": text, "output": text}

The prompt is the instruction, with the input below it. The document is the prompt.
"""

from collections.abc import Iterator

from pipeline.data.adapters.turns import UnusableError, row_of, text_of
from pipeline.data.cleaning import normalise
from pipeline.data.tables import Row

COLUMNS = "instruction, output and perhaps input, all texts"
NO_INPUT = ("<noinput>", "<no input>")
"""What stands in `input` where there is none, beside nothing at all."""


def rows(row: Row, row_type: str) -> Iterator[Row]:
    """Returns the exchange."""
    instruction, reply = text_of(row, "instruction"), text_of(row, "output")
    given = text_of(row, "input") if "input" in row else ""
    if not instruction:
        raise UnusableError("an empty instruction")
    if given.casefold() in NO_INPUT:
        given = ""
    prompt = f"{instruction}\n\n{given}" if given else instruction
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    yield row_of(row_type, turns, group=normalise(prompt))
