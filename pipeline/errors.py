"""The errors a user can mend."""

import contextlib
import shlex
import sys
from collections.abc import Iterator

LONGEST = 1000
"""Signs of a message."""


class UserError(Exception):
    """A user's mistake, told in one line: what is wrong, where, and the command that mends it.

    What a file holds may stand in the message: it is made one clear line of.
    """

    def __init__(self, message: str) -> None:
        super().__init__(line_of(message))


class UpToDate(Exception):  # noqa: N818 - an outcome, not an error
    """The stage's folder already holds exactly what was asked for."""


def line_of(text: str) -> str:
    """Returns a text as one line: signs that steer a terminal escaped, the middle of much left out.

    Where a row of a megabyte stands in it, its beginning and its end tell enough.
    """
    line = "".join(map(_shown, " ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def first_line(error: BaseException) -> str:
    """Returns the first line of what an exception says, or its name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def installing(extra: str) -> str:
    """Returns the command that installs an extra of the pipeline's where it runs."""
    return f"{shlex.quote(sys.executable)} -m pip install -c constraints.txt -e '.[{extra}]'"


@contextlib.contextmanager
def told(message: str, *, mend: str = "") -> Iterator[None]:
    """Turns whatever a library raises over a bad file into one line: the message and the reason.

    Libraries trust their files: over one that somebody changed they may raise anything, a KeyError
    deep inside as well as an error of their own, and those in Rust what is no Exception at all.

    Args:
        message: what could not be done, and where.
        mend: a sentence that says how to mend it.

    Raises:
        UserError: something was raised, by other hands than ours or the user's.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        end = f". {mend}" if mend else ""
        raise UserError(f"{message} ({kind}{first_line(error)}){end}") from error


def _shown(sign: str) -> str:
    return sign if sign.isprintable() else ascii(sign)[1:-1]
