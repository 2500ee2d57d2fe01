"""What listens on a port: the meeting of several processes, on the loopback, and nothing else."""

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch import LOOPBACK, loopback_interface, loopback_store

PROGRAM = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from pipeline.distributed import leave

dist.init_process_group("gloo")
gathered = [None, None]
dist.all_gather_object(gathered, dist.get_rank())
assert gathered == [0, 1]
if dist.get_rank() == 0:
    inodes = {}
    for process in (os.getpid(), os.getppid()):
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                inodes[os.readlink(link)] = process
            except FileNotFoundError:
                pass
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                print(table, words[1].split(":")[0], file=sys.stderr)
dist.barrier()
leave(0)  # as stages do: Python's own teardown may abort beside gloo's threads
"""
HEXADECIMAL_LOOPBACK = "0100007F"
"""127.0.0.1 as /proc/net/tcp writes it."""


def test_the_store_is_reached_on_the_loopback_alone():
    store = loopback_store()
    socket.create_connection((LOOPBACK, store.port), timeout=5).close()
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    others |= {"127.0.0.2"}  # another address of this machine that a wide listener would answer
    for address in others - {LOOPBACK}:
        with pytest.raises(OSError), socket.create_connection((address, store.port), timeout=5):
            pass


def test_the_interface_is_the_loopback():
    assert loopback_interface() in {name for _, name in socket.if_nameindex()}
    assert loopback_interface().startswith("lo")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's list of sockets")
def test_several_processes_listen_on_the_loopback_alone(tmp_path):
    (tmp_path / "meeting.py").write_text(PROGRAM)
    path = os.pathsep.join([str(Path.cwd()), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", "2", "meeting"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    listening = done.stderr.split("\n")[:-1]
    assert len(listening) >= 2  # the store of the launcher, and gloo's own
    assert set(listening) == {f"tcp {HEXADECIMAL_LOOPBACK}"}


def test_nothing_else_of_ours_listens():
    """No server is started anywhere but in `pipeline.launch` and the dashboard."""
    words = {"create_server", "bind", "listen", "serve_forever"}
    words |= {"TCPServer", "HTTPServer", "ThreadingHTTPServer"}
    found = {
        str(path)
        for folder in ("pipeline", "stages")
        for path in Path(folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in words
    }
    assert found == {
        "pipeline/launch.py",
        "pipeline/dashboard/server.py",
        "stages/dashboard.py",
    }
