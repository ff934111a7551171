"""An OpenAI-compatible endpoint for tests and benchmarks that answers with a function, and has the faults of
real endpoints at reproducible requests."""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

from megatron_sov.work.endpoints.cache import EndpointCache

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""Function from a chat-completions body (messages, seed, temperature, tools) to a text or a message."""
MODEL = "scripted"
WIRE_FAULTS = ("timeout", "garbage", "cut", "429", "503", "html", "wrong json", "reset")
"""Faults of the connection or server; the next attempt may succeed."""
MODEL_FAULTS = ("empty", "loop", "length")
"""Faulty answers of the model, the same at every attempt."""
MAX_FAULTS = 3
"""Largest number of successive wire faults for a request."""


def completion(answer: str | Mapping[str, Any], prompt_tokens: int = 10) -> dict[str, Any]:
    """Return the chat completion of a text or a message. `finish_reason` and `model` in the message become
    fields of the completion."""
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else dict(answer)
    model = {"model": message.pop("model")} if "model" in message else {}
    reason = message.pop("finish_reason", "tool_calls" if message.get("tool_calls") else "stop")
    return {**model, "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": estimate_tokens(message)}}


def stream_of(answer: Mapping[str, Any]) -> bytes:
    """Return a completion as stream events: a word of reasoning or content each, then all tool calls."""
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


def estimate_tokens(messages: Any) -> int:
    """Return the approximate number of tokens of messages: one per four characters."""
    return len(json.dumps(messages, ensure_ascii=False)) // 4


def draw_fixed(*parts: object) -> float:
    """Map a key to a fixed number in [0, 1)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def with_model_faults(reply: Replies, share: float) -> Replies:
    """Wrap a model so that a share of its answers is empty, repeats itself, or is truncated."""
    def answer(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
        key = EndpointCache.key("", request)
        if draw_fixed("model", key) >= share:
            return reply(request)
        fault = MODEL_FAULTS[int(draw_fixed("which", key) * len(MODEL_FAULTS))]
        if fault == "empty":
            return ""
        if fault == "loop":
            return "and again and again, " * 100
        message = reply(request)
        text = message if isinstance(message, str) else str(message.get("content") or "")
        return {"role": "assistant", "content": text[:len(text) // 2] or "cut", "finish_reason": "length"}

    return answer


class ScriptedEndpoint(ThreadingHTTPServer):
    """Answers and counts requests, some of them with faults.

    Args:
        reply: the model.
        wire_faults: share of attempts with a wire fault, the same attempts in every run.
        late_s: silence of the fault "timeout".
        slow_s: delay of every answer.
        port: listening port; 0: a free port.
        host: listening address.
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
        """Key of a request -> complete answers, which a provider would bill."""
        self.outcomes: Counter[str] = Counter()
        """Fault, or "answer" -> number of attempts."""
        self.requests: list[dict[str, Any]] = []
        """Bodies, in order."""
        self.next: list[str] = []
        """Faults of the next attempts in place of random faults; "": no fault."""
        self.has_template = True
        """Value of `has_chat_template` in the model's card."""
        self.key_header = ""
        """Authorization header of the last request."""

    @property
    def url(self) -> str:
        """Base URL, up to `/v1`."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def fault(self, key: str) -> str:
        """Count an attempt at a request, and return its fault ("": no fault)."""
        with self.lock:
            number = self.asked[key]
            self.asked[key] += 1
            if self.next:
                return self.next.pop(0)
        if number >= MAX_FAULTS or draw_fixed("wire", key, number) >= self.wire_faults:
            return ""
        return WIRE_FAULTS[int(draw_fixed("kind", key, number) * len(WIRE_FAULTS))]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: tests kill clients."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedEndpoint
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body waits 40 ms for the acknowledgement of the headers

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
            whole = completion(self.server.reply(body), estimate_tokens(body["messages"]))
            answer = stream_of(whole) if body.get("stream") else json.dumps(whole).encode()
            if fault == "cut":
                self._send(200, answer[:len(answer) // 2], {"content-length": str(len(answer))})
                self.close_connection = True
                return
            with self.server.lock:
                self.server.answered[key] += 1
            self._send(200, answer)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def serving(endpoint: ScriptedEndpoint) -> Iterator[ScriptedEndpoint]:
    """Run an endpoint in a thread while the context is open."""
    threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield endpoint
    finally:
        endpoint.shutdown()
        endpoint.server_close()
