"""A finished folder waits beside itself while it is made again, and returns where that fails."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.distributed import is_main
from pipeline.errors import UserError
from pipeline.manifest import MANIFEST
from pipeline.points import Points

log = logging.getLogger(__name__)


def former_of(path: Path) -> Path:
    """Returns where a finished folder waits while it is made again."""
    folder = path.resolve()
    return folder.with_name(f".{folder.name}.former")


def put_aside(path: Path) -> None:
    """Lets a finished folder wait until another takes its place."""
    if (path / MANIFEST).is_file():
        shutil.rmtree(former_of(path), ignore_errors=True)
        path.resolve().replace(former_of(path))


def bring_back(points: Points) -> None:
    """Brings back what waits since a session that was killed, where that left no point."""
    if former_of(points.folder).is_dir():
        _withdraw(points)


@contextlib.contextmanager
def undone_on_failure(points: Points) -> Iterator[None]:
    """Withdraws what a session made that fails; of our own bugs the logs stay to look at.

    Where a former result waits, it returns whatever ended the session.
    """
    try:
        yield
    except BaseException as error:
        waits = former_of(points.folder).is_dir()
        if is_main() and (waits or isinstance(error, UserError | OSError)):
            _withdraw(points)
        raise


def _withdraw(points: Points) -> None:
    """Leaves nothing half-made where there is no point to go on from; a former result returns."""
    folder, former = points.folder.resolve(), former_of(points.folder)
    if (folder / MANIFEST).is_file() or points.latest() is not None:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if former.is_dir():
        former.replace(folder)
        log.info("%s: %s is the finished result from before again", points.stage, points.folder)
