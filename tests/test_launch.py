"""Launching several processes: they are connected, and a child's exit code is passed on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import os, sys
from pathlib import Path
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
Path(sys.argv[1], f"{rank}-of-{world}").touch()
assert sys.argv[3:] == ["--run=a", "--m"], sys.argv
if rank == "0":
    print("one line for the user", file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""


def launch(folder: Path, exit_code: int) -> subprocess.CompletedProcess[str]:
    """Two processes of a program that leaves a file per process and exits with the code."""
    (folder / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(Path.cwd()), str(folder)])
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline.launch",
            "2",
            "program",
            str(folder),
            str(exit_code),
            "--run=a",
            "--m",
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_processes_are_numbered(tmp_path):
    assert launch(tmp_path, 0).returncode == 0
    assert {path.name for path in tmp_path.glob("*-of-*")} == {"0-of-2", "1-of-2"}


def test_a_mistake_is_one_line_and_its_exit_code(tmp_path):
    result = launch(tmp_path, 2)
    assert result.returncode == 2
    assert result.stderr == "one line for the user\n"


def test_an_interruption_ends_the_processes_without_a_traceback(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nopen(f'started-{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.launch", "2", "sleeper"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(tmp_path)])},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "pipeline/launch.py" not in said
