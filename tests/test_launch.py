"""Launching several processes: they are connected, numbered, and end together."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NUMBERED = """
import os, sys
from pathlib import Path
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
Path(sys.argv[1], f"{rank}-of-{world}").touch()
assert sys.argv[3:] == ["--run=a", "--m", f"--num_processes={world}"], sys.argv
assert os.environ["ACCELERATE_USE_CPU"] == "1"
if rank == "0":
    print("one line for the user", file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""

SUMMED = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
number = torch.tensor([2 ** dist.get_rank()])
dist.all_reduce(number)
line = f"{number.item()} {os.environ['LOCAL_RANK']} {sys.argv[1]}\\n"
os.write(1, line.encode())  # in one piece: another process writes to the same pipe
dist.destroy_process_group()
"""

STUCK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "1":
    {fault}
time.sleep(600)
"""
"""Process 0 hears no signal, as in the middle of a collective operation."""

HURRIED = """
import os, signal, subprocess, sys
from pipeline import launch

signal.signal(signal.{name}, signal.SIG_DFL)  # nohup would have it ignored

class Popen(subprocess.Popen):
    def __init__(self, *words, **settings):
        if {child} == len(children):
            signal.raise_signal(signal.{name})
        super().__init__(*words, **settings)
        children.append(self.pid)
        open(f"child-{{self.pid}}", "w").close()

children = []
subprocess.Popen = Popen
sys.exit(launch.main(["2", "sleeper"]))
"""
"""A launcher that gets a signal just before it starts the child of a number."""


def started(folder: Path, program: str, *words: object, **variables: str) -> subprocess.Popen[str]:
    """The launcher at work on a program."""
    (folder / "program.py").write_text(program)
    path = os.pathsep.join([str(Path.cwd()), str(folder)])
    before = [str(word) for word in words if str(word).startswith("--config")]
    processes, *rest = [str(word) for word in words if str(word) not in before]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.launch", *before, processes, "program", *rest],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ORPHAN = """
import os, time
from pathlib import Path
from pipeline.command import command
from pipeline.config import StageConfig

def run(config):
    Path(f"child-{os.getpid()}").touch()
    time.sleep(600)

words = ["--recipe=none", "--num_processes=2"]
raise SystemExit(command(StageConfig, run, words, stage="none"))
"""


def alive(number: int) -> bool:
    """Whether there is a process of a number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_are_numbered_and_told_how_many_they_are(tmp_path):
    process = started(tmp_path, NUMBERED, 2, tmp_path, 0, "--run=a", "--m")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert {path.name for path in tmp_path.glob("*-of-*")} == {"0-of-2", "1-of-2"}


def test_a_mistake_is_one_line_and_its_exit_code(tmp_path):
    process = started(tmp_path, NUMBERED, 2, tmp_path, 2, "--run=a", "--m")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == "one line for the user\n"


def interrupted(process, folder) -> str:
    """What is said after an interruption, once both processes have left a file started-N."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("started-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1]


def test_an_interruption_ends_the_processes_without_a_traceback(tmp_path):
    program = (
        "import os, time\nopen(f'started-{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(600)\n"
    )
    process = started(tmp_path, program, 2)
    said = interrupted(process, tmp_path)
    assert process.returncode == 128 + signal.SIGINT
    assert "pipeline/launch.py" not in said


def test_a_signal_that_ends_python_itself_is_told_by_its_own_exit_code(tmp_path):
    program = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: os._exit(1))\n"  # as while Python starts
        "open(f'started-{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(600)\n"
    )
    process = started(tmp_path, program, 2)
    said = interrupted(process, tmp_path)
    assert (process.returncode, said) == (128 + signal.SIGINT, "")


@pytest.mark.parametrize(("name", "child"), [("SIGINT", 1), ("SIGTERM", 0), ("SIGHUP", 1)])
def test_a_signal_while_the_processes_start_reaches_all_of_them(tmp_path, name, child):
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    result = subprocess.run(
        [sys.executable, "-c", HURRIED.format(name=name, child=child)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(tmp_path)])},
        timeout=60,
    )
    children = [int(path.name.removeprefix("child-")) for path in tmp_path.glob("child-*")]
    left = [number for number in children if alive(number)]
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert (len(children), left) == (2, [])
    assert result.returncode == 128 + (2 if name == "SIGINT" else 15)


@pytest.mark.skipif(platform.system() != "Linux", reason="the system tells of no parent's death")
def test_a_launcher_that_is_killed_leaves_no_process_behind(tmp_path):
    (tmp_path / "configs" / "none").mkdir(parents=True)
    (tmp_path / "configs" / "none" / "none.yaml").write_text("{}")
    process = started(tmp_path, ORPHAN, 2)
    deadline = time.monotonic() + 60
    while len(children := list(tmp_path.glob("child-*"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    try:
        _, said = process.communicate(timeout=30)  # until the last of them has ended
        assert "none: interrupted; the same command goes on" in said
    finally:
        for number in [int(path.name.removeprefix("child-")) for path in children]:
            if alive(number):
                os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 of 2 was killed by SIGKILL, and "),
        ("sys.exit('its own words')", 1, "process 1 of 2 ended with exit code 1, its message "),
        ("sys.exit(2)", 2, "process 1 of 2 failed, and the others were ended"),
    ],
)
def test_a_process_that_fails_ends_those_that_hear_no_signal(tmp_path, fault, code, line):
    process = started(tmp_path, STUCK.format(fault=fault), 2)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said.splitlines()[-1].startswith(line)


def test_a_process_that_ended_well_is_told_where_others_waited_for_it(tmp_path):
    program = "import os, time\ntime.sleep(int(os.environ['RANK']))\nexit(int(os.environ['RANK']))"
    process = started(tmp_path, program, 2)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.splitlines()[-1] == (
        "process 1 of 2 ended with exit code 1, its message stands above; "
        "process 0 ended with exit code 0"
    )


def test_others_may_finish_what_they_write_when_one_was_asked_to_stop(tmp_path):
    program = (
        "import os, sys, time\nrank = os.environ['RANK']\n"
        "time.sleep(6 * (rank == '0'))\nopen(f'written-{rank}', 'w').close()\nsys.exit(75)\n"
    )
    process = started(tmp_path, program, 2)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "written-0").exists()


def test_two_machines_are_connected_by_what_each_is_told(tmp_path):
    yaml = Path("configs/accelerate/multi_node.yaml").read_text()
    yaml = yaml.replace("use_cpu: false", "use_cpu: true").replace("MULTI_GPU", "MULTI_CPU")
    (tmp_path / "two.yaml").write_text(yaml.replace("num_processes: 16", "num_processes: 4"))
    machines = [
        started(
            tmp_path, SUMMED, "--config=two.yaml", 0,
            SLURM_NNODES="2", SLURM_NODEID=str(number), SLURM_LAUNCH_NODE_IPADDR="127.0.0.1",
            SLURM_JOB_ID=str(os.getpid()), GLOO_SOCKET_IFNAME="lo",
        )
        for number in range(2)
    ]  # fmt: skip
    ends = [machine.communicate(timeout=60) for machine in machines]
    for machine, (said, errors) in zip(machines, ends, strict=True):
        assert machine.returncode == 0, errors
        assert sorted(said.splitlines()) == [f"15 {local} --num_processes=4" for local in (0, 1)]


@pytest.mark.parametrize(("processes", "connected"), [(0, 2), (1, 1), (3, 3)])
def test_the_number_that_is_said_comes_before_the_yaml(tmp_path, processes, connected):
    yaml = Path("configs/accelerate/cpu.yaml").resolve()
    program = "import os, sys\nos.write(1, f'{sys.argv[-1]}\\n'.encode())\n"
    process = started(tmp_path, program, f"--config={yaml}", processes)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.splitlines() == [f"--num_processes={connected}"] * connected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9999", "this"], "NPROC=9999: at most"),
        (["--config=configs/accelerate/ddp.yaml", "0", "this"], "ddp.yaml asks for 2 GPU(s) on t"),
        ([], "how many processes of which program? Say: python -m pipeline.launch 2 stages.ppo"),
        (["--config=configs/accelerate/ddp.yaml"], "how many processes of which program?"),
        (["2"], "how many processes of which program?"),
        (["two", "this"], "how many processes of which program?"),
        (["0", "this"], "how many processes of which program?"),
    ],
)
def test_what_cannot_be_launched_is_told_in_one_line(words, message):
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
