"""The errors a user can mend."""


class UserError(Exception):
    """A user's mistake, told in one line: what is wrong, where, and the command that mends it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UpToDate(Exception):  # noqa: N818 - an outcome, not an error
    """The stage's folder already holds exactly what was asked for."""


def first_line(error: BaseException) -> str:
    """Returns what a library's error says, without the lines that explain it at length."""
    return next(iter(str(error).splitlines()), type(error).__name__)
