"""One session of a stage: its `make` line, struck or not, to its end."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.crash.chain import Chain
from benchmarks.crash.moments import Strike

INSIDE = Path(__file__).parent / "inside"
TIMEOUT_SECONDS = 300.0
"""A session of the smoke recipe that takes longer hangs."""
OUTER = ("MAKE", "MFLAGS", "WANDB_", "RANK", "WORLD_SIZE", "CRASH_")
"""Beginnings of the environment's names that an outer make or launcher may have set."""


@dataclass(frozen=True)
class Session:
    """How a session went.

    Attributes:
        started: when, in seconds since the epoch.
        seconds: how long it took.
        output: what make and the stage wrote.
        code: exit code of make; negative, the signal that ended it.
        changes: seconds since the start, and what changed in the folder.
        struck: when the signal was sent, in seconds since the epoch; None when it was not.
    """

    started: float
    seconds: float
    output: str
    code: int
    changes: tuple[tuple[float, str], ...]
    struck: float | None

    @property
    def ended_by(self) -> str:
        """What make says of the stage's end: an exit code or a signal's name; 0 for success."""
        # A progress bar may stand before it in its line.
        said = re.findall(r"make: \*\*\* \[.*\] (?:Error )?(.+)$", self.output, re.MULTILINE)
        if said:
            return str(said[-1])
        return signal.Signals(-self.code).name if self.code < 0 else str(self.code)

    @property
    def resumed_from(self) -> int | None:
        """The step that the stage said it goes on from."""
        said = re.search(r"goes on from step (\d+)", self.output)
        return int(said[1]) if said else None


def run(chain: Chain, stage: str, strike: Strike | None = None) -> Session:
    """Returns how the stage's `make` line went, struck at an instant or left alone."""
    trace = chain.run.parent / "trace"
    trace.unlink(missing_ok=True)
    aim = strike or Strike("none", count=0)
    order = {
        "stage": stage,
        "folder": str(chain.folder(stage).resolve()),
        "trace": str(trace.resolve()),
        **asdict(aim),
        "signal": signal.Signals[aim.signal].value,
    }
    finished = (chain.folder(stage) / "manifest.json").is_file()
    started = time.time()
    process = subprocess.Popen(
        chain.line(stage),
        cwd=chain.checkout,
        env=_environment() | {"CRASH_ORDER": json.dumps(order)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    by_clock = strike if strike and not strike.pattern else None
    output, struck = _to_the_end(process, by_clock)
    assert trace.is_file() or process.returncode or finished, f"{stage} was not watched: {output}"
    changes = _read(trace, started)
    inside = [seconds for seconds, change in changes if change == "struck"]
    return Session(
        started=started,
        seconds=time.time() - started,
        output=output,
        code=process.returncode,
        changes=tuple(pair for pair in changes if pair[1] != "struck"),
        struck=started + inside[0] if inside else struck,
    )


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTER)}
    path = [str(INSIDE), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _to_the_end(
    process: "subprocess.Popen[str]", strike: Strike | None
) -> tuple[str, float | None]:
    """Returns the output, and when the clock struck.

    The output ends when the last process of the group is gone, so nothing of a killed session is
    left to write into the folder of the next.
    """
    struck = None
    try:
        if strike is not None:
            try:
                return process.communicate(timeout=strike.delay)[0], None
            except subprocess.TimeoutExpired:
                struck = time.time()
                os.killpg(process.pid, signal.Signals[strike.signal])
        return process.communicate(timeout=TIMEOUT_SECONDS)[0], struck
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{process.communicate()[0]}\nmake: *** [{TIMEOUT_SECONDS:.0f} s] hung", struck
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _read(trace: Path, started: float) -> list[tuple[float, str]]:
    """The lines of a trace; none when the stage never began."""
    if not trace.is_file():
        return []
    lines = (line.split(" ", 1) for line in trace.read_text(encoding="utf-8").splitlines())
    return [(float(seconds) - started, change) for seconds, change in lines]
