"""The server: who may ask, for what, and what never leaves the folder of the runs."""

import http.client
import json
import os
import socket
import threading

import pytest

from pipeline.dashboard.server import ASSETS, POLICY, REPORT_POLICY, Server, serve
from pipeline.errors import UserError
from tests.dashboard.runs import finished, trained


@pytest.fixture
def server(tmp_path):
    """A server of a folder with one run, at work in a thread."""
    trained(finished(tmp_path / "runs" / "a" / "ppo"), steps=3, of=3)
    finished(tmp_path / "runs" / "a" / "report")
    (tmp_path / "runs" / "a" / "report" / "index.html").write_text("<h1>report</h1>")
    (tmp_path / "secret.txt").write_text("secret")
    made = serve(tmp_path / "runs", host="127.0.0.1", port=0, names=("My-Machine",))
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def get(server, path, method="GET", **headers):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, body


def raw(server, request):
    """The first line that a request of these bytes is answered with."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request)
        return connection.makefile("rb").readline().decode()


def test_the_page_needs_nothing_else(server):
    for address, (_, kind) in ASSETS.items():
        status, headers, body = get(server, address)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert headers["Content-Security-Policy"] == POLICY
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "://" not in body.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in body
        assert " style=" not in body
    assert "unsafe" not in POLICY


def test_it_answers_what_the_page_asks(server):
    told = json.loads(get(server, "/api/runs")[2])
    assert [run["name"] for run in told["runs"]] == ["a"]
    assert json.loads(get(server, "/api/run?run=a")[2])["stages"][5]["state"] == "finished"
    [chart, *_] = json.loads(get(server, "/api/curves?run=a&stage=ppo")[2])["charts"]
    assert chart["lines"][0]["x"] == [1, 2, 3]
    assert json.loads(get(server, "/api/samples?run=a&stage=ppo&step=1")[2])["rows"] == []
    assert json.loads(get(server, "/api/compare?run=a&stage=ppo")[2])["stages"] == ["ppo", "report"]


def test_what_has_not_changed_is_not_sent_again(server):
    _, headers, _ = get(server, "/api/curves?run=a&stage=ppo")
    same = get(server, "/api/curves?run=a&stage=ppo", If_None_Match=headers["ETag"])
    assert (same[0], same[2]) == (304, "")


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8400", "localhost:8400", "[::1]", "192.168.1.7:80", "my-machine:8400"]
)
def test_it_is_called_by_its_names_and_by_numbers(server, host):
    assert get(server, "/api/runs", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8400", "", "[x", "a b"])
def test_another_hosts_name_is_refused(server, host):
    """Else a foreign page could lead its own name here, and read."""
    status, _, body = get(server, "/api/runs", Host=host)
    assert status == 403
    assert "this host is not known here" in body


def test_a_request_with_two_hosts_or_none_is_refused(server):
    two = b"GET /api/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"
    assert raw(server, two).startswith("HTTP/1.1 403")
    assert raw(server, b"GET /api/runs HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 403")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_only_get_is_answered(server, method):
    assert get(server, "/api/runs", method=method)[0] == 501


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/..%2fsecret.txt",
        "//etc/passwd",
        "/runs/a/ppo/manifest.json",
        "/server.py",
        "/report/../../secret.txt?run=a",
        "/report/index.html?run=../runs/a",
        "/report/index.html?run=.",
        "/report/manifest.json?run=a",
        "/report/rollouts.html?run=a",
        "/api/run?run=../a",
        "/api/run?run=%2e%2e",
        "/api/run?run=a%00",
        "/api/run",
        "/api/run?run=a&run=a",
        "/api/curves?run=a&stage=../report",
        "/api/samples?run=a&stage=ppo&step=x",
        "/api/samples?run=a&stage=/etc",
    ],
)
def test_nothing_else_has_an_address(server, path):
    status, headers, body = get(server, path)
    assert status == 404
    assert headers["Content-Type"].startswith("text/plain")
    assert "secret" not in body


def test_an_address_that_cannot_be_read(server):
    assert get(server, "/api/run?" + "&".join(["run=a"] * 99))[0] == 400
    broken = b"GET http://[x/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(server, broken).startswith("HTTP/1.1 400")


def test_a_link_does_not_lead_out(server, tmp_path):
    folder = tmp_path / "runs" / "a" / "ppo"
    rows = '{"step": 1, "secret": 1.0}\n{"step": 2, "secret": 2.0, "prompt": "secret"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "rows.jsonl")
    for path in ("/api/curves?run=a&stage=ppo", "/api/samples?run=a&stage=ppo"):
        status, _, body = get(server, path)
        assert status == 404
        assert "leads out of the folder" in json.loads(body)["error"]
        assert '"secret' not in body
    page = tmp_path / "runs" / "a" / "report" / "rollouts.html"
    page.symlink_to(tmp_path / "secret.txt")
    assert get(server, "/report/rollouts.html?run=a")[0] == 404


def test_a_report_gets_no_script_and_an_origin_of_its_own(server):
    status, headers, body = get(server, "/report/index.html?run=a")
    assert (status, body) == (200, "<h1>report</h1>")
    assert headers["Content-Security-Policy"] == REPORT_POLICY
    assert "sandbox" in REPORT_POLICY
    assert "script-src" not in REPORT_POLICY


def test_a_pipe_in_place_of_a_log_holds_nobody_up(server, tmp_path):
    log = tmp_path / "runs" / "a" / "ppo" / "metrics.jsonl"
    log.unlink()
    os.mkfifo(log)
    assert get(server, "/api/curves?run=a&stage=ppo")[0] == 200
    assert get(server, "/api/run?run=a")[0] == 200


def test_it_listens_on_its_address_alone(server):
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.server_port), 5):
        pass


def test_a_browser_that_goes_away_is_no_error(server, capsys):
    for error in (ConnectionResetError(), TimeoutError()):
        try:
            raise error
        except OSError:
            server.handle_error(None, ("127.0.0.1", 1))
    assert capsys.readouterr().err == ""
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        server.handle_error(None, ("127.0.0.1", 1))
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_what_cannot_be_listened_on_is_told(server, tmp_path):
    port = server.server_port
    with pytest.raises(
        UserError, match=rf"port {port} is taken. Choose another: --port={port + 1}"
    ):
        serve(tmp_path, host="127.0.0.1", port=port, names=())
    with pytest.raises(UserError, match=r"--host=203.0.113.1: not an address of this machine"):
        serve(tmp_path, host="203.0.113.1", port=0, names=())
    with pytest.raises(UserError, match=r"--host=no.such.name.invalid: not an address"):
        serve(tmp_path, host="no.such.name.invalid", port=0, names=())


def test_a_port_of_the_system_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Server, "server_bind", refuse)
    with pytest.raises(UserError, match=r"port 80 is not yours to take. Choose one above 1023"):
        serve(tmp_path, host="127.0.0.1", port=80, names=())
