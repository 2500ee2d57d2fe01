"""Experiment trackers beside metrics.jsonl: the only module that knows wandb."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import StageConfig

log = logging.getLogger(__name__)

UNTRACKED = ("data", "tokenizer", "report", "seeds")
"""Stages that learn and measure nothing: a tracker would only cost them seconds of start-up."""


class Tracker:
    """Sends metrics to a wandb run, or nowhere.

    A stage that goes on from a resume point takes some steps again, to the same figures. Those that
    an earlier session has sent are not sent twice, so that the run continues.
    """

    def __init__(self, tracker: Any = None, *, sent: int = 0) -> None:
        """Takes the last step that was sent before, of which a part may be missing."""
        self._tracker, self._sent = tracker, sent

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends one row of metrics."""
        if self._tracker is not None and step >= self._sent:
            self._tracker.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Ends the tracker's run; when it was offline, says how to upload it."""
        if self._tracker is None:
            return
        run = self._tracker.run
        offline, folder = os.environ.get("WANDB_MODE") == "offline", Path(run.dir).parents[1]
        self._tracker.finish()
        if offline:  # every session of the run wrote a folder of its own
            log.info("wandb was offline; to upload this run: wandb sync %s/*-%s", folder, run.id)


def open_tracker(config: StageConfig, *, stage: str, digest: str, sent: int = 0) -> Tracker:
    """Returns the configured tracker of a stage; wandb is offline when no key is configured.

    The run's identity is the digest of the stage's resume key, so an interrupted stage continues
    the same wandb run, after the last step that was `sent`. Call it after `distributed.setup`,
    which Accelerate's tracker needs.
    """
    if config.tracking == "none" or stage in UNTRACKED:
        return Tracker()
    import wandb
    from accelerate.tracking import WandBTracker

    if "WANDB_MODE" not in os.environ and not _key_is_configured():
        os.environ["WANDB_MODE"] = "offline"
    folder = config.run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    tracker = WandBTracker(
        run_name=os.environ.get("WANDB_PROJECT", "rlhf-pipeline"),
        name=f"{config.run_dir.name}-{stage}",
        group=config.run_dir.name,
        job_type=stage,
        id=f"{stage}-{digest[:16]}",
        resume="allow",
        dir=str(folder.parent),
        # No git: of a remote's address, wandb would write the name, where a token may stand.
        settings=wandb.Settings(silent=True, console="off", disable_git=True),
    )
    tracker.start()
    tracker.store_init_configuration(config.content())
    return Tracker(tracker, sent=sent)


def _key_is_configured() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
