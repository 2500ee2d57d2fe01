"""Writes a run as one self-contained HTML page.

Reads   every other folder of runs/<recipe>.
Writes  runs/<recipe>/report/index.html: targets, reward and gold against KL, win rates, the
        reward-model report, samples side by side, curves of every stage, lineage; no network.
        rollouts.html beside it shows the rollouts that ppo kept, token by token.
Run     make report RECIPE=cpu
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.checkpoint import begin, open_artifact
from pipeline.command import command
from pipeline.config import StageConfig
from pipeline.distributed import only_main

PARENTS = {
    "data": "dataset",
    "tokenizer": "tokenizer",
    "pretrain": "causal-lm",
    "sft": "causal-lm",
    "reward": "reward",
    "ppo": "causal-lm",
    "evaluate": "report",
}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """The page of a run."""

    title: str = ""
    """Heading of the page; the run folder's name when empty."""


def run(config: Config) -> None:
    """Gathers the run's folders and writes the page."""
    if not only_main(config):
        return
    parents = {
        name: open_artifact(config.folder(name), kind=kind) for name, kind in PARENTS.items()
    }
    with begin(config, stage="report", kind="report", parents=parents) as stage:
        from pipeline.reporting.content import page_content
        from pipeline.reporting.microscope import microscope
        from pipeline.reporting.page import render

        content = page_content(parents, title=config.title or config.run_dir.name)
        page = stage.path / "index.html"
        page.write_text(render(content), encoding="utf-8")
        if content["rollouts"]:
            rollouts = microscope(parents["ppo"].path, title=content["title"])
            (stage.path / "rollouts.html").write_text(rollouts, encoding="utf-8")
        met, size = sum(row["met"] for row in content["targets"]), page.stat().st_size
        stage.finish(
            f"{met} of {len(content['targets'])} targets met, {size / 2**20:.1f} MiB",
            chosen={},
            summary={"minutes": content["minutes"], "targets_met": met},
            card="# Report\n\nOpen `index.html` in a browser; it needs no network.",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="report")


if __name__ == "__main__":
    raise SystemExit(main())
