"""The dashboard's HTTP server: answers GET from the runs below a folder, and nothing else.

Names in an address are looked up among what was found on the disk, never joined to a path. A
request for another host's name is refused: a foreign page could lead its own name to this machine
(DNS rebinding) and read what stands here. Addresses of numbers cannot be led anywhere.
"""

import errno
import hashlib
import http.server
import ipaddress
import json
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.dashboard.views import PAGES, Unknown, Views
from pipeline.errors import UserError

log = logging.getLogger(__name__)

ASSETS = {
    "/": ("page.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/dom.js": ("dom.js", "text/javascript"),
}
"""Our own files by their addresses."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)
"""A report is somebody's file: it gets no script, and an origin of its own."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
IDLE_SECONDS = 30
"""After which a connection that asks nothing is closed."""
MOST_FIELDS = 64
"""Words of a query that are read."""


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    body: bytes
    kind: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    policy: str = POLICY

    @property
    def tag(self) -> str:
        """Names the body, so that a page is not sent again what it has."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'


class Server(http.server.ThreadingHTTPServer):
    """Listens on one address and knows by which names it may be called."""

    def __init__(self, address: tuple[str, int], *, root: Path, names: tuple[str, ...]) -> None:
        """Takes host and port, the folder of the runs, and names of the host that are good."""
        self.views, self.names = Views(root), {"localhost", *(name.lower() for name in names)}
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def is_called(self, host: str) -> bool:
        """Returns whether a Host header names this server: by a number, or by a name it knows."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _is_number(name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says what went wrong, unless a browser has only gone away."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dashboard", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """Answers a question."""
        hosts = self.headers.get_all("Host") or [""]
        if len(hosts) != 1 or not self.server.is_called(hosts[0]):
            text = "403 this host is not known here: call it by its number, or see --allow\n"
            self._send(_text(text, HTTPStatus.FORBIDDEN))
            return
        self._send(answer(self.server.views, self.path))

    def _send(self, told: Answer) -> None:
        same = told.status == HTTPStatus.OK and self.headers.get("If-None-Match") == told.tag
        self.send_response(HTTPStatus.NOT_MODIFIED if same else told.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", told.policy)
        self.send_header("ETag", told.tag)
        if not same:
            self.send_header("Content-Type", f"{told.kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(told.body)))
        self.end_headers()
        if not same:
            self.wfile.write(told.body)

    def log_message(self, *_: Any) -> None:
        """Says nothing of a request: the page asks every few seconds."""


def answer(views: Views, address: str) -> Answer:
    """Returns the answer to the address of a GET request."""
    try:
        parts = urlsplit(address)
        query = parse_qs(parts.query, max_num_fields=MOST_FIELDS)
    except ValueError:
        return _text("400 this address cannot be read\n", HTTPStatus.BAD_REQUEST)
    try:
        if parts.path in ASSETS:
            file, kind = ASSETS[parts.path]
            return Answer((Path(__file__).parent / file).read_bytes(), kind)
        if parts.path.removeprefix("/report/") in PAGES:
            page = views.page_of(_one(query, "run"), parts.path.removeprefix("/report/"))
            return Answer(page.read_bytes(), "text/html", policy=REPORT_POLICY)
        if parts.path in QUESTIONS:
            return _json(QUESTIONS[parts.path](views, query))
    except (Unknown, OSError):
        pass
    except UserError as error:
        return _json({"error": str(error)}, HTTPStatus.NOT_FOUND)
    return _text("404 nothing of that name here\n", HTTPStatus.NOT_FOUND)


Query = Mapping[str, list[str]]

QUESTIONS: dict[str, Callable[[Views, Query], dict[str, Any]]] = {
    "/api/runs": lambda views, _: views.overview(),
    "/api/run": lambda views, query: views.run(_one(query, "run")),
    "/api/curves": lambda views, query: views.curves(query.get("run", []), _one(query, "stage")),
    "/api/compare": lambda views, query: views.comparison(
        query.get("run", []), _one(query, "stage")
    ),
    "/api/samples": lambda views, query: views.samples(
        _one(query, "run"), _one(query, "stage"), _number(query, "step")
    ),
}
"""What the page may ask, by address."""


def serve(root: Path, *, host: str, port: int, names: tuple[str, ...]) -> Server:
    """Returns a server that listens; its `serve_forever` answers.

    Args:
        root: folder of the runs.
        host: address it binds to.
        port: its port; 0 for any that is free.
        names: names of the host, besides localhost, by which it may be called.

    Raises:
        UserError: the port is taken or not ours, or the address is not one of this machine.
    """
    try:
        return Server((host, port), root=root, names=(host, *names))
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} is taken. Choose another: --port={port + 1}",
            errno.EACCES: f"port {port} is not yours to take. Choose one above 1023: --port=8400",
        }
        other = f"--host={host}: not an address of this machine ({error.strerror})"
        raise UserError(reasons.get(error.errno or 0, other)) from error


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _one(query: Query, name: str) -> str:
    values = query.get(name, [])
    if len(values) != 1:
        raise Unknown
    return values[0]


def _number(query: Query, name: str) -> float | None:
    try:
        return float(query[name][0]) if name in query else None
    except ValueError:
        raise Unknown from None


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(json.dumps(value, allow_nan=False).encode(), status=status)


def _text(text: str, status: HTTPStatus) -> Answer:
    return Answer(text.encode(), "text/plain", status)
