"""Runs the whole chain with several seeds and puts their figures into one table.

Reads   nothing; each seed is `make all` in a run folder of its own, runs/<recipe>-seed-N, which
        goes on where it was interrupted and does nothing when it is finished.
Writes  runs/<recipe>-seeds/seeds: seeds.json, and the table in README.md.
Run     make seeds SEEDS="1 2 3" RECIPE=cpu
"""

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.checkpoint import begin, open_artifact
from pipeline.command import command
from pipeline.config import StageConfig, require
from pipeline.distributed import num_cores
from pipeline.errors import UserError
from pipeline.stopping import Terminated
from pipeline.storage import make_folder, read_json, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Whole runs with several seeds."""

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds, each a whole run."""
    parallel: int = 1
    """Runs at the same time; they share the processor's cores."""
    tracking: str = "auto"
    """Experiment trackers of every stage of every run; auto: as each stage's own YAML says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        require(
            distinct and min(self.seeds) >= 0,
            f"seeds: must be different numbers from 0 on, got {self.seeds}",
        )
        require(
            self.run_dir.name not in ("", ".."),
            f"run: {self.run_dir} is no folder with a name, beside which those of the seeds lie",
        )
        require(self.parallel >= 1, f"parallel: must be at least 1, got {self.parallel}")

    def seed_folder(self, seed: int) -> Path:
        """Run folder of a seed."""
        return self.run_dir.with_name(f"{self.run_dir.name}-seed-{seed}")

    @property
    def shared_threads(self) -> int:
        """Threads of one process: as configured, or a fair share among parallel runs."""
        cores = num_cores()
        return self.threads or (max(1, cores // self.parallel) if self.parallel > 1 else 0)


def make_words(config: Config, seed: int) -> list[str]:
    """Returns the make command of one seed's run."""
    settings = [f"--seed={seed}"]
    settings += [f"--tracking={config.tracking}"] if config.tracking != "auto" else []
    settings += ["--deterministic=true"] if config.deterministic else []
    settings += [f"--threads={config.shared_threads}"] if config.shared_threads else []
    words = ["make", "--no-print-directory", "all", f"RECIPE={config.recipe}"]
    words += [f"RUN={config.seed_folder(seed)}", f"PYTHON={sys.executable}"]
    words += [f"ARGS={' '.join(settings)}"]
    words += [f"NPROC={config.num_processes}"] if config.num_processes > 1 else []
    return words + (["FORCE=1"] if config.force else [])


def run_seed(config: Config, seed: int) -> None:
    """Runs the chain with one seed; parallel runs speak into make.log in their own folders."""
    folder = config.seed_folder(seed)
    log.info("seeds: seed %d in %s", seed, folder)
    words = make_words(config, seed)
    if config.parallel == 1:
        code, place = subprocess.run(words, check=False).returncode, "above"
    else:
        make_folder(folder)
        place = str(folder / "make.log")
        with (folder / "make.log").open("w", encoding="utf-8") as file:
            code = subprocess.run(words, check=False, stdout=file, stderr=file).returncode
    if code:
        raise UserError(
            f"seed {seed} ended with exit code {code} (its own words: {place}). "
            "Mend that and run the same command again; finished stages are kept"
        )


def run(config: Config) -> None:
    """Runs every seed and writes the table."""
    with ThreadPoolExecutor(max_workers=config.parallel) as pool:
        try:
            list(pool.map(lambda seed: run_seed(config, seed), config.seeds))
        except Terminated:  # Ctrl-C has reached them by itself
            for started in psutil.Process().children():
                started.terminate()
            raise
    from pipeline.evaluation.seeds import (
        INTERVAL,
        pooled_win_rate,
        run_figures,
        seed_table,
        seeds_markdown,
    )

    parents = {
        f"seed-{seed}": open_artifact(config.seed_folder(seed) / "evaluate", kind="report")
        for seed in config.seeds
    }
    together = config.run_dir.with_name(f"{config.run_dir.name}-seeds")
    target = dataclasses.replace(config, run=str(together))
    with begin(target, stage="seeds", kind="report", parents=parents) as stage:
        folders = {seed: config.seed_folder(seed) for seed in config.seeds}
        figures = {
            seed: run_figures(folder, summary=parents[f"seed-{seed}"].summary)
            for seed, folder in folders.items()
        }
        pooled = pooled_win_rate(list(folders.values()))
        first = read_json(next(iter(folders.values())) / "evaluate" / "results.json")
        rows = seed_table(figures, pooled=pooled, ranges=first.get("targets", {}))
        table = {"interval": INTERVAL, "figures": rows, "pooled_gold_win_rate": pooled}
        write_json(stage.path / "seeds.json", table)
        wins = next(row for row in rows if row["name"] == "gold_win_rate")
        stage.finish(
            f"gold win rate {wins['mean']:.3f} over {len(figures)} seeds",
            chosen={},
            summary={row["name"]: row["mean"] for row in rows},
            card=seeds_markdown(rows, pooled=pooled, recipe=config.recipe),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="seeds")


if __name__ == "__main__":
    raise SystemExit(main())
