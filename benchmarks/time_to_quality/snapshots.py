"""Policies saved while a trainer works. Imports nothing but Python: the peer's environment too."""

import json
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = "seconds.json"
"""File beside the policies: seconds of training behind each, and its updates."""


class Snapshots:
    """Saves the policy between two updates, off the clock.

    Attributes:
        seconds: of training so far, without what saving took.
    """

    def __init__(self, folder: Path, *, interval: float, limit: float) -> None:
        """Takes the folder, and seconds of training: between two policies, and in all."""
        self.folder, self.interval, self.limit = folder, interval, limit
        self.seconds, self.updates, self.saved = 0.0, 0, list[dict[str, float]]()
        folder.mkdir(parents=True)
        self.since = time.perf_counter()

    def after_update(self, save: Callable[[Path], None]) -> bool:
        """Returns whether there is time left, after saving the policy where it is due."""
        self.seconds += time.perf_counter() - self.since
        self.updates += 1
        last = self.saved[-1]["seconds"] if self.saved else 0.0
        if self.seconds - last >= self.interval:
            save(self.folder / f"{len(self.saved)}")
            self.saved.append({"seconds": self.seconds, "updates": self.updates})
            (self.folder / SECONDS).write_text(json.dumps(self.saved))
        self.since = time.perf_counter()
        return self.seconds < self.limit
