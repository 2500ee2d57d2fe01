"""The real trackio, in its local database: what a run that was killed and goes on has told it."""

import json
import sys
from pathlib import Path

from tests.support import at_home

SESSION = """
import logging, os, signal, sys, time
from pipeline import distributed
from pipeline.checkpoint import begin
from pipeline.config import StageConfig

logging.basicConfig(level="INFO", format="%(message)s")
config = StageConfig(tracking="trackio")
distributed.setup(config)
with begin(config, stage="sft", kind="causal-lm", parents={}) as run:
    run.total_steps = 4
    point = run.latest_point()
    for step in range(point[0] + 1 if point else 1, 5):
        run.log(step, {"train/loss": float(step)})
        run.log_timings(step, {"time/seconds": 1.0})
        if step == 2:
            run.save_point(step, lambda path: (path / "a").write_text("a"))
        if str(step) in sys.argv[1:]:
            time.sleep(2)  # trackio writes what it was told every half a second
            os.kill(os.getpid(), signal.SIGKILL)
    run.log_samples(4, [{"prompt": "<b>a", "score": 0.5}, {"prompt": "c", "score": 1}])
    run.finish("done", chosen={}, summary={"loss": {"last": 0.5}}, card="")
"""
"""A stage that saves at step 2 and, where it is told to, is killed after a step."""
TRACKIO = str(Path(sys.executable).with_name("trackio"))
QUERY = [TRACKIO, "query", "project", "--project", "rlhf-pipeline", "--json", "--sql"]


def test_a_run_that_was_killed_goes_on_in_trackio_and_no_step_is_there_twice(tmp_path):
    killed = at_home(sys.executable, "-c", SESSION, "3", folder=tmp_path)
    assert (killed.returncode, killed.stdout) == (-9, ""), killed.stderr
    done = at_home(sys.executable, "-c", SESSION, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    where = tmp_path / "runs" / "cpu" / "trackio"
    show = f"to see it: TRACKIO_DIR={where} {{}} show --project rlhf-pipeline"
    assert {show.format("trackio"), show.format(TRACKIO)} & set(done.stderr.splitlines())

    def rows(table: str) -> list[dict]:
        asked = at_home(
            *QUERY, f"select * from {table}", folder=tmp_path, variables={"TRACKIO_DIR": str(where)}
        )
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout)["rows"]

    sent = [(row["step"], json.loads(row["metrics"])) for row in rows("metrics order by id")]
    every = [1, 2, 3, 4]
    for name, steps in (("train/loss", every), ("time/seconds", every), ("samples", [4])):
        assert [step for step, metrics in sent if name in metrics] == steps
    assert all("system/memory_gib" in metrics for _, metrics in sent if "time/seconds" in metrics)
    [table] = [metrics["samples"] for _, metrics in sent if "samples" in metrics]
    assert table["_value"] == [{"prompt": "<b>a", "score": 0.5}, {"prompt": "c", "score": 1}]

    [config] = [json.loads(row["config"]) for row in rows("configs")]
    assert (config["seed"], config["recipe"], config["parents"]) == (1, "cpu", {})
    assert config["_Group"].startswith("cpu-")
    [artifact] = rows("artifact_versions")
    assert artifact["producer_run_name"].startswith("cpu-sft sft-")
    manifest = (tmp_path / "runs" / "cpu" / "sft" / "manifest.json").read_bytes()
    blobs = [path.read_bytes() for path in (where / "artifacts").rglob("*") if path.is_file()]
    assert manifest in blobs
