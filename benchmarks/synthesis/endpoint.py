"""An OpenAI-compatible endpoint for tests and benchmarks that answers with a function. It can misbehave
like real endpoints, reproducibly."""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_sov.work.endpoints.cache import EndpointCache

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""Takes a chat-completions body (messages, seed, temperature, tools), gives a text or a message."""
MODEL = "scripted"
WIRE_FAULTS = ("timeout", "garbage", "cut", "429", "503", "html", "wrong json", "reset")
"""What comes in place of an answer; the next attempt may be answered."""
MODEL_FAULTS = ("empty", "loop", "length")
"""What the model itself says, however often it is asked the same."""
MAX_FAULTS = 3
"""In a row, for one request."""


def completion(said: str | Mapping[str, Any], read_tokens: int = 10) -> dict[str, Any]:
    """Return the chat completion of a text or a message; the message may hold its `finish_reason`, and the
    `model` that the completion states."""
    message = {"role": "assistant", "content": said} if isinstance(said, str) else dict(said)
    model = {"model": message.pop("model")} if "model" in message else {}
    reason = message.pop("finish_reason", "tool_calls" if message.get("tool_calls") else "stop")
    return {**model, "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": read_tokens, "completion_tokens": tokens_in(message)}}


def stream_of(answer: Mapping[str, Any]) -> bytes:
    """Return a completion as stream events: thoughts and content word by word, tool calls whole."""
    choice = answer["choices"][0]
    message = choice["message"]
    deltas = [{name: piece} for name in ("reasoning_content", "content")
              for piece in re.findall(r"\S*\s*", message.get(name) or "") if piece]
    if message.get("tool_calls"):
        deltas.append({"tool_calls": [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]})
    chunks = [*({"delta": delta, "finish_reason": None} for delta in deltas),
              {"delta": {}, "finish_reason": choice["finish_reason"]}]
    events: list[dict[str, Any]] = [*({"choices": [{"index": 0, **chunk}]} for chunk in chunks),
                                    {"choices": [], "usage": answer["usage"]}]
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + (
        b"data: [DONE]\n\n")


def tokens_in(said: Any) -> int:
    """Return about how many tokens a message has, or several: four characters each."""
    return len(json.dumps(said, ensure_ascii=False)) // 4


def drawn(*parts: object) -> float:
    """Map a key to a fixed number in [0, 1)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def with_model_faults(reply: Replies, share: float) -> Replies:
    """Wrap a model so that a share of its answers is empty, repeats itself, or is truncated."""
    def answer(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
        key = EndpointCache.key("", request)
        if drawn("model", key) >= share:
            return reply(request)
        fault = MODEL_FAULTS[int(drawn("which", key) * len(MODEL_FAULTS))]
        if fault == "empty":
            return ""
        if fault == "loop":
            return "and again and again, " * 100
        said = reply(request)
        text = said if isinstance(said, str) else str(said.get("content") or "")
        return {"role": "assistant", "content": text[:len(text) // 2] or "cut", "finish_reason": "length"}

    return answer


class ScriptedEndpoint(ThreadingHTTPServer):
    """Answers requests, counts them, and misbehaves.

    Args:
        reply: the model.
        wire_faults: share of attempts at which something else comes; the same in every run.
        late_s: how long a "timeout" says nothing.
        slow_s: how long every answer takes.
        port: that it listens on; 0: any that is free.
        host: address that it listens on.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Replies, wire_faults: float = 0.0, late_s: float = 1.0,
                 slow_s: float = 0.0, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), _Handler)
        self.reply, self.wire_faults, self.late_s, self.slow_s = reply, wire_faults, late_s, slow_s
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        """Key of a request -> attempts."""
        self.answered: Counter[str] = Counter()
        """Key of a request -> answers that would be billed."""
        self.outcomes: Counter[str] = Counter()
        """What came back -> how often."""
        self.requests: list[dict[str, Any]] = []
        """Bodies, in order."""
        self.next: list[str] = []
        """Faults of the next attempts, before any others; "" is none."""
        self.has_template = True
        """Whether its card says that it has a chat template."""
        self.key_header = ""
        """Authorization of the last request."""

    @property
    def url(self) -> str:
        """Return its address, up to `/v1`."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def fault(self, key: str) -> str:
        """Return the fault for this attempt at a request, and count it."""
        with self.lock:
            number = self.asked[key]
            self.asked[key] += 1
            if self.next:
                return self.next.pop(0)
        if number >= MAX_FAULTS or drawn("wire", key, number) >= self.wire_faults:
            return ""
        return WIRE_FAULTS[int(drawn("kind", key, number) * len(WIRE_FAULTS))]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients are killed."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedEndpoint
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the word that its head has come

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            card = {"id": MODEL, "max_model_len": 4096, "has_chat_template": self.server.has_template}
            self._send(200, json.dumps({"data": [card]}).encode())
            return
        self._send(200 if self.path == "/health" else 404, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = EndpointCache.key(f"endpoint:{body.get('model')}", body)
        fault = self.server.fault(key)
        with self.server.lock:
            self.server.outcomes[fault or "answer"] += 1
            self.server.requests.append(body)
            self.server.key_header = self.headers.get("authorization", "")
        time.sleep(self.server.late_s if fault == "timeout" else self.server.slow_s)
        if fault in ("timeout", "reset"):
            self.close_connection = True
            return
        if fault in ("429", "503", "401", "400"):
            self._send(int(fault), b"slow down", {"retry-after": "0"})
        elif fault == "html":
            self._send(200, b"<html>Welcome</html>")
        elif fault == "garbage":
            self._send(200, hashlib.sha256(key.encode()).digest())
        elif fault == "wrong json":
            self._send(200, b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}')
        elif fault == "too long":
            self._send(400, b'{"error": {"code": "context_length_exceeded"}}')
        else:
            made = completion(self.server.reply(body), tokens_in(body["messages"]))
            answer = stream_of(made) if body.get("stream") else json.dumps(made).encode()
            if fault == "cut":
                self._send(200, answer[:len(answer) // 2], {"content-length": str(len(answer))})
                self.close_connection = True
                return
            with self.server.lock:
                self.server.answered[key] += 1
            self._send(200, answer)

    def _send(self, status: int, body: bytes, more: Mapping[str, str] | None = None) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in ({"content-length": str(len(body))} | dict(more or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(endpoint: ScriptedEndpoint) -> Iterator[ScriptedEndpoint]:
    """Serve while the context is open."""
    threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield endpoint
    finally:
        endpoint.shutdown()
        endpoint.server_close()
