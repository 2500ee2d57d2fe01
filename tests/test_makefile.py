"""The Makefile, driven with an interpreter that only notes what it was asked to run."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report"]

FAKE_PYTHON = """#!/bin/sh
# Notes its words; finishes the stage by writing the manifest, or fails when told to.
echo "$@" >> calls
for word in "$@"; do case $word in
  stages.*) stage=${word#stages.} ;;
  --run=*) run=${word#--run=} ;;
esac; done
[ "$FAIL" = "$stage" ] && { echo "$stage: what is wrong and how to mend it" >&2; exit 2; }
[ "$UNCHANGED" = "$stage" ] && exit 0
mkdir -p "$run/$stage"
sleep 0.02
echo "{}" > "$run/$stage/manifest.json"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with our Makefile, an empty recipe and the fake interpreter."""
    shutil.copy("Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(name, tmp_path)
    recipe = tmp_path / "configs" / "tiny"
    recipe.mkdir(parents=True)
    for stage in [*STAGES, "reward_guard"]:
        (recipe / f"{stage}.yaml").touch()
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(
    folder: Path, *words: str, python: str = "PYTHON=./python", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs make without what an outer make hands down."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    (folder / "calls").unlink(missing_ok=True)
    return subprocess.run(
        ["make", "RECIPE=tiny", *([python] if python else []), *words],
        cwd=folder,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
    )


def calls(folder: Path) -> list[str]:
    """The command lines of the last make."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def stages(folder: Path) -> list[str]:
    """The stages of the last make, in the order they ran."""
    return [next(w for w in c.split() if w.startswith("stages."))[7:] for c in calls(folder)]


def touch(path: Path) -> None:
    """Makes a file newer than everything written before."""
    time.sleep(0.02)
    path.touch()


def test_make_runs_the_whole_chain_in_order(checkout):
    result = make(checkout)
    assert result.returncode == 0, result.stderr
    assert stages(checkout) == STAGES
    assert calls(checkout)[0].split() == ["-m", "stages.data", "--recipe=tiny", "--run=runs/tiny"]


def test_a_second_make_does_nothing_and_says_so_in_one_line(checkout):
    make(checkout)
    result = make(checkout)
    assert calls(checkout) == []
    assert result.stdout == "make: Nothing to be done for 'all'.\n"


@pytest.mark.parametrize(
    ("touched", "rerun"),
    [
        ("data", STAGES),
        ("tokenizer", STAGES[1:]),
        ("pretrain", STAGES[2:]),
        ("reward", ["reward", "ppo", "evaluate", "report"]),
        ("ppo", ["ppo", "evaluate", "report"]),
        ("report", ["report"]),
    ],
)
def test_a_touched_yaml_reruns_exactly_what_depends_on_it(checkout, touched, rerun):
    make(checkout)
    touch(checkout / "configs" / "tiny" / f"{touched}.yaml")
    make(checkout)
    assert stages(checkout) == rerun
    make(checkout)
    assert stages(checkout) == []


def test_an_interrupted_stage_reruns_alone(checkout):
    make(checkout, "ppo")
    (checkout / "runs" / "tiny" / "ppo" / "manifest.json").unlink()
    make(checkout, "ppo")
    assert stages(checkout) == ["ppo"]


def test_a_failing_stage_is_one_line_and_stops_the_chain(checkout):
    result = make(checkout, FAIL="sft")
    assert result.returncode == 2
    assert stages(checkout) == ["data", "tokenizer", "pretrain", "sft"]
    ours, of_make = result.stderr.splitlines()
    assert ours == "sft: what is wrong and how to mend it"
    assert of_make.startswith("make: *** [")
    assert of_make.endswith("Error 2")


def test_args_reach_the_named_stage_only_and_run_it_though_it_is_finished(checkout):
    make(checkout, "ppo", "ARGS=--kl.coef=0.1")
    assert stages(checkout) == ["data", "tokenizer", "pretrain", "sft", "reward", "ppo"]
    assert ["--kl.coef=0.1" in call for call in calls(checkout)] == [False] * 5 + [True]
    make(checkout, "ppo", "ARGS=--kl.coef=0.2")
    assert stages(checkout) == ["ppo"]


def test_args_of_all_reach_every_stage(checkout):
    make(checkout, "all", "ARGS=--seed=2")
    make(checkout, "ARGS=--seed=2")
    assert stages(checkout) == STAGES
    assert all(call.endswith("--seed=2") for call in calls(checkout))


def test_a_stage_that_changes_nothing_reruns_no_dependant(checkout):
    make(checkout)
    make(checkout, "sft", "report", "ARGS=--seed=1", UNCHANGED="sft")
    assert stages(checkout) == ["sft", "report"]


def test_force_rebuilds_the_named_stage(checkout):
    make(checkout)
    make(checkout, "reward", "FORCE=1")
    assert stages(checkout) == ["reward"]
    assert calls(checkout)[0].endswith("--force=true")
    make(checkout, "reward", "FORCE=0")
    assert stages(checkout) == []


def test_the_guard_is_made_when_asked_for_and_not_with_all(checkout):
    make(checkout, "reward_guard", "ARGS=--seed=2")
    assert stages(checkout) == ["data", "tokenizer", "pretrain", "sft", "reward_guard"]
    assert calls(checkout)[-1].endswith("--seed=2")
    assert not any("--seed" in call for call in calls(checkout)[:-1])
    make(checkout)
    assert stages(checkout) == ["reward", "ppo", "evaluate", "report"]


def test_the_guard_among_the_stages_is_made_before_ppo(checkout):
    names = "STAGES=data tokenizer pretrain sft ppo reward reward_guard"
    result = make(checkout, names)
    assert stages(checkout) == [*STAGES[:4], "reward", "reward_guard", "ppo"]
    assert result.stderr == ""
    touch(checkout / "configs" / "tiny" / "reward_guard.yaml")
    make(checkout, names)
    assert stages(checkout) == ["reward_guard", "ppo"]


def test_run_names_the_folder(checkout):
    make(checkout, "data", "RUN=elsewhere/mine")
    assert (checkout / "elsewhere" / "mine" / "data" / "manifest.json").exists()


def test_several_processes_go_through_the_launcher(checkout):
    result = make(checkout, "-n", "data", "NPROC=2")
    assert "./python -m pipeline.launch 2 stages.data --recipe=tiny" in result.stdout


def test_the_launcher_is_given_accelerates_file(checkout):
    (checkout / "ddp.yaml").touch()
    words = make(checkout, "-n", "data", "ACCELERATE_CONFIG=ddp.yaml", "NPROC=3").stdout
    assert "./python -m pipeline.launch --config=ddp.yaml 3 stages.data --recipe=tiny" in words


@pytest.mark.parametrize(("said", "processes"), [([], 0), (["NPROC=1"], 1)])
def test_one_process_that_is_asked_for_comes_before_accelerates_file(checkout, said, processes):
    (checkout / "ddp.yaml").touch()
    words = ["ACCELERATE_CONFIG=ddp.yaml", *said]
    launched = f"pipeline.launch --config=ddp.yaml {processes} stages.ppo --recipe=tiny"
    assert launched in make(checkout, "-n", "ppo", *words).stdout
    assert launched in make(checkout, "slurm", "DRY=1", "STAGES=ppo", *words).stdout
    make(checkout, "doctor", *words)
    assert ("--num_processes=1" in calls(checkout)[0]) == bool(said)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("RECIPE=nope", "no recipe configs/nope; recipes here: tiny"),
        ("RECIPE=tiny/../tiny", "RECIPE must be the name of a folder below configs/, got 'tiny/.."),
        ("RECIPE=t*", "RECIPE must be the name of a folder below configs/, got 't*'"),
        ("RUN=two words", "RUN must be one folder without spaces or signs of the shell, got 'two"),
        ("RUN=a;b", "RUN must be one folder without spaces or signs of the shell, got 'a;b'"),
        ("RUN=lr=3", "RUN must be one folder without spaces or signs of the shell, got 'lr=3'"),
        ("RUN=a:b", "RUN must be one folder without spaces or signs of the shell, got 'a:b'"),
        ("RUN=a#b", "RUN must be one folder without spaces or signs of the shell, got 'a#b'"),
        ("RUN=it's", "RUN must be one folder without spaces or signs of the shell, got 'it's'"),
        ("RUN=", "RUN must be one folder without spaces or signs of the shell, got ''"),
        ("NPROC=0", "NPROC must be a whole number of at least 1, got '0'"),
        ("NPROC=two", "NPROC must be a whole number of at least 1, got 'two'"),
        ("NPROC=", "NPROC must be a whole number of at least 1, got ''"),
        ("NPROC=1 2", "NPROC must be a whole number of at least 1, got '1 2'"),
        ("NPROC='; touch hacked; '", "NPROC must be a whole number of at least 1, got"),
        ("SEEDS=x", "SEEDS must be whole numbers, got 'x'"),
        ("SEEDS=1,2", "SEEDS must be whole numbers, got '1,2'"),
        ("ACCELERATE_CONFIG=configs", "ACCELERATE_CONFIG names no file: configs"),
        ("ACCELERATE_CONFIG=no.yaml", "ACCELERATE_CONFIG names no file: no.yaml"),
    ],
)
def test_a_wrong_variable_is_told_in_one_line(checkout, word, message):
    result = make(checkout, "data", word)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert calls(checkout) == []
    assert not (checkout / "hacked").exists()


@pytest.mark.parametrize("run", ["..", "a/../b", "./x", "x/", "sünde", "-x", "a,b", "a@b+c"])
def test_a_folder_of_any_other_name_is_a_run(checkout, run):
    result = make(checkout, "-n", "data", f"RUN={run}")
    assert result.returncode == 0, result.stderr
    assert f"--run={run}" in result.stdout


def pretend(folder: Path, name: str, script: str) -> None:
    """Puts a program of that name into folder/bin."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def bare_path(folder: Path) -> str:
    """A PATH of the pretended programs and the few that make itself needs."""
    for name in ("sh", "expr", "printf", "wc", "tail", "touch", "sed"):
        target = shutil.which(name)
        assert target is not None
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).symlink_to(target)
    return str(folder / "bin")


def test_an_old_python_is_told_in_one_line(checkout):
    pretend(checkout, "python3", '[ "$1" = --version ] && echo "Python 3.9.1"; exit 1')
    (checkout / "bin" / "make").symlink_to(shutil.which("make"))
    result = make(checkout, "data", python="", PATH=bare_path(checkout))
    assert result.returncode == 2
    line, _of_make = result.stderr.splitlines()
    assert line.startswith("Python 3.11 or newer is needed and none is on PATH (python3 is: Python")


def test_a_python_without_venv_is_told_in_one_line(checkout):
    pretend(checkout, "python3", "case $2 in *venv*) exit 1;; esac")
    (checkout / "bin" / "make").symlink_to(shutil.which("make"))
    result = make(checkout, "data", python="", PATH=bare_path(checkout))
    line, _of_make = result.stderr.splitlines()
    assert line.startswith("python3 lacks the modules venv and ensurepip. Install them")


def test_seeds_lineage_and_chat_hand_on_what_they_are_told(checkout):
    make(checkout, "seeds", "SEEDS=4 5", "NPROC=2", "ARGS=--parallel=2")
    assert calls(checkout) == [
        "-m stages.seeds --recipe=tiny --run=runs/tiny --num_processes=2 --seeds=[4,5] --parallel=2"
    ]
    make(checkout, "lineage", "RUN=a/run", "ARGS=--json")
    assert calls(checkout) == ["-m stages.lineage --recipe=tiny --run=a/run --json"]
    make(checkout, "chat")
    make(checkout, "chat", "MODELS=a b")
    assert calls(checkout) == ["-m stages.chat --models a b"]


def test_the_crash_test_is_told_kills_seed_and_stages(checkout):
    make(checkout, "crash-test", "KILLS=7", "SEED=3", "STAGES=sft ppo", "ARGS=--trial 2")
    assert calls(checkout) == ["-m benchmarks.crash --kills=7 --seed=3 --stages sft ppo --trial 2"]


def test_help_names_every_target_and_variable(checkout):
    words = make(checkout, "help").stdout.split()
    tools = ["slurm", "seeds", "lineage", "chat", "test", "check", "format", "help", "gpu-check"]
    for target in ["all", *STAGES, *tools, "crash-test", "fuzz"]:
        assert target in words
    variables = ("RECIPE", "RUN", "ARGS", "FORCE", "NPROC", "SEEDS", "PYTHON", "MODELS", "KILLS")
    for variable in (*variables, "SEED", "SBATCH", "SBATCH_GPU", "DRY"):
        assert variable in words


def test_gpu_check_says_plainly_that_there_is_none(checkout):
    pretend(checkout, "nogpu", "exit 1")
    result = make(checkout, "gpu-check", python="PYTHON=bin/nogpu")
    assert result.stdout == "gpu-check: no GPU here, nothing was tested\n"


def test_a_deadline_reaches_the_stages_that_save(checkout):
    make(checkout, "reward_guard", "reward", "DEADLINE=1234")
    told = [call.split()[0] for call in calls(checkout) if "--saving.deadline=1234" in call]
    assert len(calls(checkout)) == 6
    assert len(told) == 4


def test_the_doctor_is_told_recipe_processes_and_accelerates_file(checkout):
    (checkout / "ddp.yaml").touch()
    make(checkout, "doctor")
    assert calls(checkout)[0].split() == [
        "-m", "stages.doctor", "--recipe=tiny", "--run=runs/tiny"
    ]  # fmt: skip
    make(checkout, "doctor", "NPROC=4", "ACCELERATE_CONFIG=ddp.yaml", "ARGS=--device=h100")
    assert calls(checkout)[0].split()[4:] == [
        "--num_processes=4", "--accelerate_config=ddp.yaml", "--device=h100"
    ]  # fmt: skip
