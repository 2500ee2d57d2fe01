"""One side: the trainer of stages.ppo at its recipe's settings, without looks at validation.

Run     python -m benchmarks.time_to_quality.ours JOB.json      (written by the benchmark)
"""

import json
import sys
from pathlib import Path

from benchmarks.time_to_quality.snapshots import Snapshots
from pipeline.config import load
from pipeline.distributed import setup
from stages.ppo import Config, build_trainer, open_parents


def main() -> None:
    """Trains until the recipe's updates are done or the time is up."""
    job = json.loads(Path(sys.argv[1]).read_text())
    config = load(Config, [*job["words"], f"--seed={job['seed']}"], stage="ppo")
    accelerator = setup(config)
    trainer, _, _ = build_trainer(config, open_parents(config), accelerator=accelerator)
    snapshots = Snapshots(Path(job["folder"]), interval=job["interval"], limit=job["limit"])
    for number in range(config.updates):
        trainer.update(number)
        if not snapshots.after_update(trainer.roles.policy.save_pretrained):
            break


if __name__ == "__main__":
    main()
