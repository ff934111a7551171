"""vLLM's server (0.32) as a `TokenServer`: `/inference/v1/generate` of `--enable-scale-out`, and the routes
that change it, which it has with VLLM_SERVER_DEV_MODE=1."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import first_line
from megatron_sov.work.endpoints.answers import BadAnswer, NeverAnswered
from megatron_sov.work.endpoints.token_server import (
    AnswerReading, ServerCalls, TokenAnswer, TokenRequest, VersionSpan, check_answers, version_of, whole_ids)

if TYPE_CHECKING:
    import numpy as np

VLLM = "vllm"
"""The engine by name."""
WRITE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
"""Of every vLLM; it tells no versions, and no routes of the prompt."""
SendFiles = Callable[[Sequence[str], str, int, Callable[[Mapping[str, Any]], Any]], None]
"""Sends the tensors of files to the workers of a server: to its address, so many workers, told by a call what
they need in order to receive.  Raises RuntimeError or OSError where they do not arrive."""


class VllmServer:
    """One address of vLLM.

    Args:
        url: the address, without a path.
        key_env: variable of the environment with the key; none is sent where it is not set.
        answer_s: how long an answer may take.
        send: what brings it weights; None: it reads files itself.
    """

    def __init__(self, url: str, key_env: str = "", answer_s: float = 3600.0, send: SendFiles | None = None
                 ) -> None:
        self._calls = ServerCalls(url, key_env, answer_s)
        self.url = self._calls.url
        self._path, self._model, self._send = WRITE, "", send

    def write(self, request: TokenRequest) -> list[TokenAnswer]:
        """Return continuations, see `TokenServer`."""
        # no seed: on a CPU vLLM dies of one where a prompt is read in several parts
        chosen = {"max_tokens": request.max_new_tokens, "temperature": request.temperature,
                  "top_p": request.top_p, "top_k": request.top_k or -1, "logprobs": 0, "ignore_eos": True,
                  "stop_token_ids": list(request.stop_ids), "detokenize": False, "n": request.count}
        if self._path == WRITE and not request.others:  # it takes one prompt
            try:
                found = self._calls.ask(WRITE, {"request_id": request.name, "token_ids": list(request.ids),
                                                "sampling_params": chosen, "model": self._model or None})
                return check_answers(_read_tokens(found, self.url), request.num_answers, self.url)
            except NeverAnswered as e:
                # a server without --enable-scale-out does not have the route
                if "HTTP 404" not in str(e):
                    raise
                self._path = COMPLETIONS
        return check_answers(self._completions(request, chosen), request.num_answers, self.url)

    def score(self, ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of what is given, see `TokenServer`."""
        if self._path == WRITE:
            try:
                found = self._calls.ask(WRITE, {
                    "request_id": uuid.uuid4().hex, "token_ids": list(ids),
                    # a cache of its own: what is in the cache has no log-probabilities any more
                    "cache_salt": uuid.uuid4().hex,
                    "sampling_params": {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
                                        "ignore_eos": True, "detokenize": False}})
            except NeverAnswered as e:
                if "HTTP 404" not in str(e):
                    raise
                self._path = COMPLETIONS
            else:
                with AnswerReading(self.url):
                    return [float(place[str(token)]["logprob"])
                            for place, token in zip(found["prompt_logprobs"][1:], ids[1:], strict=True)]
        # of every server of completions: the prompt comes back, with one token behind it
        found = self._calls.ask(COMPLETIONS, {"prompt": list(ids), "model": self._named(), "max_tokens": 1,
                                              "temperature": 1.0, "echo": True, "logprobs": 0,
                                              "request_id": uuid.uuid4().hex})
        with AnswerReading(self.url):
            return [float(value) for value in found["choices"][0]["logprobs"]["token_logprobs"][1:len(ids)]]

    def abort(self, requests: Sequence[TokenRequest]) -> None:
        """End requests, see `TokenServer`."""
        # each route has a name of its own for what it was asked; those that do not exist are passed over
        self._calls.tell("/abort_requests", {
            "request_ids": [name for request in requests for name in (
                f"generate-tokens-{request.name}",
                *(f"cmpl-{request.name}-{place}" for place in range(len(request.prompts))))]})

    def pause(self) -> None:
        """Freeze what is under way, see `TokenServer`."""
        self._calls.tell("/pause?mode=keep&clear_cache=false")

    def update(self, files: Sequence[str], version: int) -> None:
        """Have the extension read files, or receive what is in them, see `TokenServer`."""
        self._calls.tell("/init_weight_transfer_engine", {"init_info": {}})
        self._start_update()
        if self._send is None:
            self._calls.tell("/update_weights", {"update_info": {"files": list(files)}})
        else:
            self._bring(files, self._send)
        self._calls.tell("/finish_weight_update", {"weight_version": str(version)})

    def resume(self) -> None:
        """Go on with keys and values of the new weights, see `TokenServer`."""
        # without this, what is under way would go on behind keys and values of the old ones
        said = self._calls.tell("/reset_prefix_cache?reset_running_requests=true")
        if isinstance(said, Mapping) and said.get("success") is False:
            raise BadAnswer(f"{self.url}: keeps keys and values of the weights before; its log says why")
        self._calls.tell("/resume")

    def is_healthy(self) -> bool:
        """Return whether the model is loaded and its processes live."""
        return self._calls.is_there("/health")

    def _start_update(self) -> None:
        try:
            self._calls.tell("/start_weight_update")
        except BadAnswer as e:
            # a trainer that was killed has left its own update open; what it had sent is written over
            if "already active" not in str(e):
                raise
            self._calls.tell("/finish_weight_update")
            self._calls.tell("/start_weight_update")

    def _bring(self, files: Sequence[str], send: SendFiles) -> None:
        told = self._calls.look("/get_world_size")
        with AnswerReading(self.url):
            num_workers = int(told["world_size"])
        try:
            send(files, self.url, num_workers,
                 lambda group: self._calls.tell("/update_weights", {"update_info": {"group": dict(group)}}))
        except (RuntimeError, OSError) as e:
            raise BadAnswer(f"{self.url}: the weights did not arrive ({first_line(e)})",
                            is_away=True) from None

    def _completions(self, request: TokenRequest, chosen: Mapping[str, Any]) -> list[TokenAnswer]:
        # ids in the place of texts: our servers have no tokenizer
        body = dict(chosen) | {"prompt": request.prompts if request.others else list(request.ids),
                               "model": self._named(), "return_token_ids": True,
                               "return_tokens_as_token_ids": True, "request_id": request.name}
        body.pop("detokenize")
        found = self._calls.ask(COMPLETIONS, body)
        with AnswerReading(self.url):
            return [TokenAnswer(whole_ids(choice["token_ids"]),
                                [float(value) for value in choice["logprobs"]["token_logprobs"]],
                                str(choice["finish_reason"])) for choice in found["choices"]]

    def _named(self) -> str:
        """Return the name of the server's only model."""
        if not self._model:
            found = self._calls.look("/v1/models")
            with AnswerReading(self.url):
                self._model = str(found["data"][0]["id"])
        return self._model


def _read_tokens(found: Any, url: str) -> list[TokenAnswer]:
    """Return the choices of `/inference/v1/generate`."""
    with AnswerReading(url):
        return [_read_choice(choice) for choice in found["choices"]]


def _read_choice(choice: Mapping[str, Any]) -> TokenAnswer:
    tokens = whole_ids(choice["token_ids"] or [])
    # an aborted request that had not begun tells none
    told = (choice.get("logprobs") or {"content": []})["content"]
    spans = tuple(VersionSpan(version_of(span["version"]), int(span["start"]), int(span["end"]))
                  for span in choice.get("weight_versions") or [])
    return TokenAnswer(tokens, [float(place["logprob"]) for place in told], str(choice["finish_reason"]),
                       spans if tokens else (), _routes(choice.get("routed_experts")))


def _routes(told: str | None) -> np.ndarray | None:
    """Return the array of a base64 .npy; nothing in it is unpickled."""
    import numpy as np

    if told is None:
        return None
    array: np.ndarray = np.load(io.BytesIO(base64.b64decode(told)), allow_pickle=False)
    # an archive of arrays is none, and NaN would become an expert
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise ValueError("routes that are no array of whole numbers")
    return array
