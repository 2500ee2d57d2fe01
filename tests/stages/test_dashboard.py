"""The command: it answers, says where, ends in one line, and tells mistakes in one line."""

import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from pipeline.dashboard.server import serve
from stages.dashboard import Config, main, parse


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_until_it_is_interrupted(tmp_path, ending):
    words = [sys.executable, "-m", "stages.dashboard", f"--root={tmp_path}", "--port=0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        address = re.fullmatch(
            rf"dashboard: (http://127\.0\.0\.1:\d+) shows {tmp_path}; .*\n", line
        )
        with urllib.request.urlopen(f"{address[1]}/api/runs", timeout=30) as answer:
            assert b'"runs": []' in answer.read()
        process.send_signal(ending)
        assert process.stderr.read() == "dashboard: ended\n"
        assert process.wait(30) == 0


def test_a_port_that_is_taken(tmp_path, caplog):
    with serve(tmp_path, host="127.0.0.1", port=0, names=()) as server:
        port = server.server_port
        assert main([f"--root={tmp_path}", f"--port={port}"]) == 2
    assert caplog.messages == [
        f"dashboard: port {port} is taken. Choose another: --port={port + 1}"
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--root=no/such"], "--root: no/such is no folder"),
        (["--port=-1"], r"--port: must be from 0 \(any that is free\) to 65535, got -1"),
        (["--port=x"], "argument --port: invalid int value: 'x'. Try: python -m stages.dashboard"),
        (["--rot=runs"], "unrecognized arguments: --rot=runs. Try: python -m stages.dashboard"),
    ],
)
def test_mistakes_are_told_in_one_line(words, line, caplog):
    assert main(words) == 2
    assert re.match(f"dashboard: {line}", caplog.messages[0])
    assert len(caplog.messages) == 1


def test_runs_may_be_begun_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([]) == Config(root="runs")
    assert parse(["--allow", "one", "two"]).allow == ("one", "two")
