"""A server in the tests' own process, which keeps what it is sent and answers as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    """Names in small letters."""
    body: bytes


@dataclass
class Receiver:
    """What a server received, and what it answers."""

    url: str = ""
    requests: list[Received] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """Codes of the next answers; 200 behind them."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of every answer."""
    body: bytes = b""
    """Sent over and over without an end where it is not empty."""
    hangs: threading.Event = field(default_factory=threading.Event)
    """While set, requests are read and not answered."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A server at a free port of this machine."""
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.requests.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            while found.hangs.is_set():
                time.sleep(0.01)
            self.send_response(found.answers.pop(0) if found.answers else 200)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                while found.body:
                    self.wfile.write(found.body)
            except OSError:
                pass  # the other side has gone

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.hangs.clear()
    server.shutdown()
    server.server_close()
