"""Text without the signs that would steer a terminal, and that no picture can hold."""

import io
import logging
from typing import TextIO

KEPT = "\n\t"
"""Control characters that do no more than lay out text."""


def printable(text: str) -> str:
    """Returns the text with ? for every sign that could steer the terminal.

    A model, a data row or a file's name may hold any character: escape sequences, a carriage
    return that hides what stood before it, marks that turn the writing direction.
    """
    return "".join(sign if sign.isprintable() or sign in KEPT else "?" for sign in text)


class PrintableRecord(logging.LogRecord):
    """A record of the log whose message holds nothing that steers the terminal."""

    def getMessage(self) -> str:  # noqa: N802 - logging's own name
        """Returns the message."""
        return printable(super().getMessage())


def start_logging(level: int) -> None:
    """Sends every message of this process to stderr, made harmless, ours and the libraries'."""
    logging.setLogRecordFactory(PrintableRecord)
    logging.basicConfig(level=level, format="%(message)s")


def forgive(*streams: io.TextIOBase | TextIO) -> None:
    """Makes the terminal's streams put a sign for what they cannot read or write.

    A line in another encoding than the terminal's, or a reply that it cannot show, ends nothing.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
