"""Stages as Slurm jobs: the real scripts, under programs that stand for Slurm's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import make_corpus
from tests.test_makefile import STAGES, make

SBATCH = """#!{python}
# Runs the job at once when its parents are done; again as long as it is requeued.
import os, pathlib, signal, subprocess, sys, time
number = len(list(pathlib.Path("jobs").glob("*"))) + 1
options = [word for word in sys.argv[1:] if word.startswith("--")]
script = next(i for i, word in enumerate(sys.argv) if word.endswith(".sbatch"))
words, options = sys.argv[script:], sys.argv[1:script]
job = pathlib.Path("jobs", str(number))
values = dict(word[2:].partition("=")[::2] for word in options)
parents = values.get("dependency", "afterok").split(":")[1:]
log = values["output"].replace("%x", values["job-name"]).replace("%j", str(number))
environment = {{**os.environ, "SLURM_JOB_ID": str(number), "SLURM_JOB_END_TIME": "4000000000"}}
job.write_text("RUNNING")
if any(pathlib.Path("jobs", parent).read_text() != "COMPLETED" for parent in parents):
    job.write_text("CANCELLED")
restarts = 0
while job.read_text() == "RUNNING":
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    with open(log, "a") as file:
        process = subprocess.Popen(["sh", *words], env=environment, stdout=file, stderr=file)
        if os.environ.get("TELL_THE_SCRIPT") and restarts == 0:
            while not pathlib.Path("begun").exists():
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    if pathlib.Path(f"requeued-{{number}}").exists():
        pathlib.Path(f"requeued-{{number}}").unlink()
        restarts += 1
    elif job.read_text() == "RUNNING":
        job.write_text("FAILED" if code else "COMPLETED")
print(number)
"""

SRUN = """#!{python}
# Runs the step; kills it on SIGTERM, and sends one itself to the step that is to be preempted.
import os, pathlib, signal, subprocess, sys, time
words = [word for word in sys.argv[1:] if word not in ("--ntasks-per-node=1", "--wait=120")]
process = subprocess.Popen(words)
pathlib.Path("step-" + os.environ["SLURM_JOB_ID"]).write_text(str(process.pid))
signal.signal(signal.SIGTERM, lambda *_: process.kill())
preempted = pathlib.Path("preempt").read_text().split() if pathlib.Path("preempt").exists() else []
if preempted and preempted[0] in words:
    log = pathlib.Path(preempted[1])
    while process.poll() is None and (not log.exists() or log.read_text().count("\\n") < 2):
        time.sleep(0.02)
    pathlib.Path("preempt").unlink()
    if preempted[2:]:
        pathlib.Path("jobs", os.environ["SLURM_JOB_ID"]).write_text(preempted[2])
    process.terminate()
code = process.wait()
sys.exit(code if code >= 0 else 128 - code)
"""

SCONTROL = """#!/bin/sh
# Says of a job that was cancelled what Slurm's own says while its script still runs.
case $1 in
  show)
    case $(cat "jobs/$3") in CANCELLED) state=COMPLETING ;; *) state=${SHOWN-RUNNING} ;; esac
    printf 'JobId=%s JobName=stage\\n   JobState=%s Reason=None\\n' "$3" "$state" ;;
  requeue) touch "requeued-$2" ;;
esac
"""

SCANCEL = """#!/bin/sh
# Signals a job's step, and not its script.
[ "$1" = --signal=TERM ] && kill -TERM "$(cat "step-$2")"
"""

STAGE = """#!/bin/sh
# A stage that takes long the first time and saves when it is told to stop; notes its words.
echo "$@" >> calls
for word in "$@"; do case $word in
  stages.*) stage=${word#stages.} ;;
  --run=*) run=${word#--run=} ;;
esac; done
[ "$FAIL" = "$stage" ] && { echo "$stage: what is wrong" >&2; exit 2; }
mkdir -p "$run/$stage"
if [ "$SLOW" = "$stage" ] && [ ! -e "$run/$stage/point" ]; then
  trap 'touch "$run/$stage/point"; exit ${CODE:-75}' TERM
  printf '1\\n2\\n' > "$run/$stage/metrics.jsonl"
  touch begun
  for _ in $(seq 600); do sleep 0.05; done
  exit 1
fi
echo "{}" > "$run/$stage/manifest.json"
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with our Makefile and job script, Slurm's programs and a stage of milliseconds."""
    shutil.copy("Makefile", tmp_path)
    shutil.copytree("configs/slurm", tmp_path / "configs" / "slurm")
    recipe = tmp_path / "configs" / "tiny"
    recipe.mkdir()
    for stage in STAGES:
        (recipe / f"{stage}.yaml").touch()
    slurm(tmp_path)
    program(tmp_path / "python", STAGE)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def slurm(folder: Path) -> None:
    """Puts Slurm's programs into a folder."""
    (folder / "bin").mkdir()
    (folder / "jobs").mkdir()
    program(folder / "bin" / "sbatch", SBATCH.format(python=sys.executable))
    program(folder / "bin" / "srun", SRUN.format(python=sys.executable))
    program(folder / "bin" / "scontrol", SCONTROL)
    program(folder / "bin" / "scancel", SCANCEL)


def submitted(
    folder: Path, *words: str, **variables: str
) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """States of the jobs of `make slurm` by stage, and what make said."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = make(folder, "slurm", *words, PATH=path, **variables)
    lines = [line for line in result.stdout.splitlines() if ": job " in line and "$" not in line]
    named = [line.split(": job ") for line in lines]
    states = {stage: (folder / "jobs" / number).read_text() for stage, number in named}
    return states, result


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def log_of(folder: Path, stage: str) -> str:
    (path,) = (folder / "runs" / "tiny" / "slurm").glob(f"{stage}-*.log")
    return path.read_text()


def test_the_chain_is_a_job_a_stage_after_its_parents(checkout):
    states, result = submitted(checkout)
    assert states == dict.fromkeys(STAGES, "COMPLETED"), result.stderr
    assert [call.split()[1] for call in calls(checkout)] == [f"stages.{s}" for s in STAGES]
    told = [call.split()[1] for call in calls(checkout) if "--saving.deadline=4000000000" in call]
    assert told == ["stages.pretrain", "stages.sft", "stages.reward", "stages.ppo"]


def test_a_dry_run_shows_the_commands_and_submits_nothing(checkout):
    words = ["DRY=1", "STAGES=sft reward ppo", "ARGS=--seed=2", "SBATCH=--partition=long"]
    words += ["SBATCH_GPU=--gres=gpu:8 --nodes=2", "NPROC=16", "ACCELERATE_CONFIG=Makefile"]
    _, result = submitted(checkout, *words)
    lines = result.stdout.splitlines()
    assert lines[0] == "mkdir -p runs/tiny/slurm"
    assert lines[-2] == (
        "ppo=$(sbatch --parsable --job-name=ppo --output=runs/tiny/slurm/%x-%j.log "
        "--kill-on-invalid-dep=yes --dependency=afterok:$sft:$reward "
        "--partition=long --gres=gpu:8 --nodes=2 configs/slurm/stage.sbatch deadline "
        "./python -m pipeline.launch --config=Makefile 16 stages.ppo "
        "--recipe=tiny --run=runs/tiny --seed=2)"
    )
    assert not list((checkout / "jobs").iterdir())
    assert not (checkout / "runs").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("SBATCH=--qos=low --dependency=afterok:7", "leave '--dependency=afterok:7' out"),
        ("SBATCH_GPU=--array=0-3", "leave '--array=0-3' out"),
        ("STAGES=sft nosuch", "STAGES must be some of: data tokenizer .*; got 'nosuch'"),
        ("STAGES=ppo,sft", "got 'ppo,sft'"),
        ("STAGES=", "got none"),
    ],
)
def test_what_would_make_other_jobs_is_refused(checkout, word, message):
    _, result = submitted(checkout, "DRY=1", word)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert result.stdout == ""


def test_stages_are_submitted_in_the_order_of_the_chain(checkout):
    _, result = submitted(checkout, "DRY=1", "STAGES=evaluate ppo")
    jobs = [line.partition("=")[0] for line in result.stdout.splitlines() if "sbatch" in line]
    assert jobs == ["ppo", "evaluate"]


def test_ppo_waits_for_the_guard_that_is_named_among_the_stages(checkout):
    words = [f"STAGES={' '.join([*STAGES[:5], 'reward_guard', *STAGES[5:]])}", "ARGS=--seed=2"]
    _, result = submitted(checkout, "DRY=1", "SBATCH_GPU=--gres=gpu:8 --mem=512G", *words)
    jobs = {line.partition("=")[0]: line for line in result.stdout.splitlines() if "sbatch" in line}
    assert list(jobs) == [*STAGES[:5], "reward_guard", *STAGES[5:]]
    assert "--dependency=afterok:$data:$sft --gres=gpu:8 --mem=512G " in jobs["reward_guard"]
    assert "stage.sbatch deadline ./python -m stages.reward_guard" in jobs["reward_guard"]
    assert jobs["reward_guard"].endswith(" --seed=2)")
    assert "--dependency=afterok:$data:$sft:$reward:$reward_guard " in jobs["ppo"]
    assert result.stderr == ""
    states, _ = submitted(checkout, *words, FAIL="reward_guard")
    assert (states["reward"], states["ppo"]) == ("COMPLETED", "CANCELLED")


def test_a_stage_that_fails_cancels_those_that_wait_for_it(checkout):
    states, _ = submitted(checkout, FAIL="reward")
    done = dict.fromkeys(["data", "tokenizer", "pretrain", "sft"], "COMPLETED")
    left = dict.fromkeys(["ppo", "evaluate", "report"], "CANCELLED")
    assert states == {**done, "reward": "FAILED", **left}
    assert "reward: what is wrong" in log_of(checkout, "reward")


@pytest.mark.parametrize("code", ["75", "143"])
def test_a_preempted_stage_is_requeued_and_goes_on(checkout, code):
    (checkout / "preempt").write_text("stages.sft runs/tiny/sft/metrics.jsonl")
    states, _ = submitted(checkout, SLOW="sft", CODE=code)
    assert set(states.values()) == {"COMPLETED"}
    assert sum("stages.sft" in call for call in calls(checkout)) == 2
    assert "stopped and saved; it is requeued and goes on" in log_of(checkout, "sft")


def test_a_signal_to_the_script_reaches_the_stage(checkout):
    states, _ = submitted(checkout, "STAGES=sft", SLOW="sft", TELL_THE_SCRIPT="1")
    assert states == {"sft": "COMPLETED"}
    assert len(calls(checkout)) == 2
    assert (checkout / "runs" / "tiny" / "sft" / "point").exists()  # it could save


def test_a_job_that_was_cancelled_is_not_requeued(checkout):
    (checkout / "preempt").write_text("stages.sft runs/tiny/sft/metrics.jsonl CANCELLED")
    states, _ = submitted(checkout, "STAGES=sft", SLOW="sft")
    assert states == {"sft": "CANCELLED"}
    assert len(calls(checkout)) == 1
    assert "is not requeued: JobState=COMPLETING" in log_of(checkout, "sft")


@pytest.mark.parametrize(("shown", "state"), [("SIGNALING", "COMPLETED"), ("", "FAILED")])
def test_a_job_that_slurm_still_signals_is_requeued_and_one_it_does_not_know_is_not(
    checkout, shown, state
):
    (checkout / "preempt").write_text("stages.sft runs/tiny/sft/metrics.jsonl")
    states, _ = submitted(checkout, "STAGES=sft", SLOW="sft", SHOWN=shown)
    assert states == {"sft": state}


def test_a_stage_that_never_gets_anywhere_is_not_requeued_for_ever(checkout):
    (checkout / "preempt").write_text("stages.sft runs/tiny/sft/metrics.jsonl")
    states, _ = submitted(checkout, "STAGES=sft", SLOW="sft", MOST_REQUEUES="0")
    assert states == {"sft": "FAILED"}
    assert "requeued 0 times and is not done" in log_of(checkout, "sft")


def test_a_real_stage_of_two_processes_is_preempted_and_goes_on(tmp_path):
    slurm(tmp_path)
    for name in ("Makefile", "configs", "pipeline", "stages"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    folder = tmp_path / "runs" / "smoke"
    make_corpus(folder)
    (tmp_path / "preempt").write_text(f"stages.pretrain {folder}/pretrain/metrics.jsonl")
    words = ["STAGES=pretrain", "RECIPE=smoke", "NPROC=2", f"PYTHON={sys.executable}"]
    states, _ = submitted(
        tmp_path, *words, "ARGS=--training.steps=80 --saving.every=0 --tracking=none"
    )
    (path,) = (folder / "slurm").glob("pretrain-*.log")
    said = path.read_text()
    assert states == {"pretrain": "COMPLETED"}, said
    assert "which is saved; the same command goes on" in said
    assert "pretrain: goes on from step" in said
    manifest = json.loads((folder / "pretrain" / "manifest.json").read_text())
    assert manifest["circumstances"]["summary"]["steps"] == 80
