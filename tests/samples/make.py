"""Writes a sample of the present format: a data folder, and a model folder with a resume point.

    python -m tests.samples.make

One sample of every format lies beside this file and is never written again: what an older version
left on somebody's disk must open, or be refused in one line, for ever.
"""

from pathlib import Path

from pipeline import manifest, points
from pipeline.checkpoint import Artifact, begin, open_artifact
from pipeline.config import StageConfig

SAMPLES = Path(__file__).parent
PRESENT = SAMPLES / f"format-{max(manifest.FORMAT_VERSION, points.FORMAT_VERSION)}"
"""Manifests and resume points have formats of their own; a sample is named by the newer one."""
STEPS = 2
KINDS = {"data": "dataset", "sft": "causal-lm"}


class Frozen(StageConfig):
    """Settings that no later version adds to."""

    def content(self):
        return {"seed": 1, "threads": 1, "training": {"steps": STEPS}}


def config_of(run: Path) -> Frozen:
    """Settings of the sample's stages in a run folder."""
    return Frozen(run=str(run), threads=1, tracking="none")


def parents_of(run: Path) -> dict[str, Artifact]:
    """What the sample's model is made from."""
    return {"data": open_artifact(run / "data", kind=KINDS["data"])}


def make(run: Path) -> None:
    """Writes both folders."""
    with begin(config_of(run), stage="data", kind=KINDS["data"], parents={}) as stage:
        (stage.path / "sources.json").write_text("[]\n", encoding="utf-8")
        stage.finish("a sample", chosen={}, summary={}, card="# Sample")
    with begin(config_of(run), stage="sft", kind=KINDS["sft"], parents=parents_of(run)) as stage:
        (stage.path / "config.json").write_text('{"model_type": "none"}\n', encoding="utf-8")
        stage.log(1, {"train/loss": 0.5})
        stage.log(STEPS, {"train/loss": 0.25})
        stage.save_point(STEPS, lambda point: (point / "state.txt").write_text("state\n") and None)
        stage.finish("a sample", chosen={}, summary={"loss": 0.25}, card="# Sample")


if __name__ == "__main__":
    make(PRESENT)
