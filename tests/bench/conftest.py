"""An endpoint that says what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_sov.bench.lm import answers
from megatron_sov.work.endpoints.answers import TEXTS


class ScriptedEndpoint(ThreadingHTTPServer):
    """Answers as `reply` says; notes what it is asked, but for the questions that models are known by."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        """Path, request and key of each."""
        self.reply: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda payload: None
        """From a request to an answer; None: it fails."""
        self.name = "one"
        """Answer to those questions."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def payloads(self) -> list[dict[str, Any]]:
        return [payload for _, payload, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedEndpoint

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer: dict[str, Any] | None = {"choices": [{"text": self.server.name}]}
        if not any(text in json.dumps(payload) for text in TEXTS):
            self.server.asked.append((self.path, payload, self.headers.get("authorization")))
            answer = self.server.reply(payload)
        body = json.dumps(answer or {}).encode()
        self.send_response(500 if answer is None else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedEndpoint]:
    monkeypatch.setattr(answers, "LIMITS", replace(answers.LIMITS, backoff_s=0.001))
    with ScriptedEndpoint() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
