"""Shows every run in the browser, live: stages, curves, samples, and runs side by side.

Reads   every run below runs/, again and again while the page is open.
Writes  nothing, and reaches nothing outside this machine.
Run     make dashboard
        python -m stages.dashboard --root=/scratch/runs --port=9000

It answers on this machine alone. From another one: ssh -L 8400:127.0.0.1:8400 <this machine>.
"""

import argparse
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.command import USER_MISTAKE, Parser
from pipeline.config import require
from pipeline.errors import UserError
from pipeline.terminal import start_logging

log = logging.getLogger("stages.dashboard")

ROOT = "runs"
LARGEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is shown, and where."""

    root: str = ROOT
    """Folder below which the runs lie."""
    host: str = "127.0.0.1"
    """Address it listens on; 0.0.0.0 for all, where whoever reaches the machine can read along."""
    port: int = 8400
    """Its port."""
    allow: tuple[str, ...] = ()
    """Names of this machine by which it may be called, beside localhost and numbers."""

    def __post_init__(self) -> None:
        is_there = Path(self.root).is_dir() or (self.root == ROOT and not Path(ROOT).exists())
        require(is_there, f"--root: {self.root} is no folder")
        require(
            0 <= self.port <= LARGEST_PORT,
            f"--port: must be from 0 (any that is free) to {LARGEST_PORT}, got {self.port}",
        )


def parse(argv: Sequence[str] | None) -> Config:
    """Returns the configuration of a command line."""
    parser = Parser(
        prog="python -m stages.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", default=ROOT, help="folder below which the runs lie (runs)")
    parser.add_argument("--host", default="127.0.0.1", help="address it listens on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8400, help="its port (8400); 0: any")
    parser.add_argument(
        "--allow",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names of this machine by which it may be called, beside localhost and numbers",
    )
    values = vars(parser.parse_args(argv))
    return Config(**values | {"allow": tuple(values["allow"])})


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Ends the dashboard as Ctrl-C does."""
    raise KeyboardInterrupt


def run(config: Config) -> None:
    """Answers until it is interrupted."""
    from pipeline.dashboard.server import serve

    with serve(Path(config.root), host=config.host, port=config.port, names=config.allow) as server:
        host, port = (f"[{config.host}]" if ":" in config.host else config.host), server.server_port
        log.info("dashboard: http://%s:%d shows %s; Ctrl-C ends it", host, port, config.root)
        signal.signal(signal.SIGTERM, interrupt)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("dashboard: ended")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    start_logging(logging.INFO)
    try:
        run(parse(argv))
    except UserError as error:
        log.error("dashboard: %s", error)
        return USER_MISTAKE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
