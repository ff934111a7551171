"""Client of vLLM 0.32, with `/inference/v1/generate` (--enable-scale-out) and the control routes of
VLLM_SERVER_DEV_MODE=1."""

import base64
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sov.base.errors import first_error_line
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused
from megatron_sov.work.endpoints.token_server import (
    ServerCalls, TokenAnswer, TokenRequest, VersionSpan, check_answers, check_token_ids, parse_answer,
    parse_version)

GENERATE_PATH = "/inference/v1/generate"
COMPLETIONS_PATH = "/v1/completions"
"""Route of every vLLM server; reports neither weight versions nor routes of prompt tokens."""
SendFiles = Callable[[Sequence[str], str, int, Callable[[Mapping[str, Any]], Any]], None]
"""Sends the tensors in files to a server's workers: (files, address, number of workers, call that passes
transfer settings to the workers). Raises RuntimeError or OSError on failure."""


class VllmServer:
    """A vLLM server at an address; methods are thread-safe.

    Methods raise `TimeoutError`, `BadAnswer` for unusable replies (`is_unavailable` if unreachable), or
    `RequestRefused` for permanent refusals.

    Args:
        url: address without path.
        key_env: environment variable with the API key; unset sends no key.
        answer_s: timeout of answers.
        send: transfers weights to the server; None: the server reads files itself.
    """

    def __init__(self, url: str, key_env: str = "", answer_s: float = 3600.0, send: SendFiles | None = None
                 ) -> None:
        self._calls = ServerCalls(url, key_env, answer_s)
        self.url = self._calls.url
        self._path, self._model, self._send = GENERATE_PATH, "", send

    def write(self, request: TokenRequest) -> list[TokenAnswer]:
        """Generate `request.num_answers` answers; blocks until the last has ended."""
        # no seed: on CPUs vLLM crashes with a seed when a prompt is prefilled in chunks
        sampling = {"max_tokens": request.max_new_tokens, "temperature": request.temperature,
                    "top_p": request.top_p, "top_k": request.top_k or -1, "logprobs": 0, "ignore_eos": True,
                    "stop_token_ids": list(request.stop_ids), "n": request.count}
        if self._path == GENERATE_PATH and not request.others:  # the route accepts a single prompt
            try:
                reply = self._calls.ask(GENERATE_PATH,
                                        {"request_id": request.name, "token_ids": list(request.ids),
                                         "sampling_params": {**sampling, "detokenize": False},
                                         "model": self._model or None})
                return check_answers(_parse_choices(reply, self.url), request.num_answers, self.url)
            except RequestRefused as e:
                # servers without --enable-scale-out lack the route
                if "HTTP 404" not in str(e):
                    raise
                self._path = COMPLETIONS_PATH
        return check_answers(self._request_completions(request, sampling), request.num_answers, self.url)

    def score(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of `ids[1:]` at temperature 1."""
        if self._path == GENERATE_PATH:
            try:
                reply = self._calls.ask(GENERATE_PATH, {
                    "request_id": uuid.uuid4().hex, "token_ids": list(ids),
                    # own cache salt: cached tokens have no log-probabilities
                    "cache_salt": uuid.uuid4().hex,
                    "sampling_params": {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
                                        "ignore_eos": True, "detokenize": False}})
            except RequestRefused as e:
                if "HTTP 404" not in str(e):
                    raise
                self._path = COMPLETIONS_PATH
            else:
                with parse_answer(self.url):
                    return [float(place[str(token)]["logprob"])
                            for place, token in zip(reply["prompt_logprobs"][1:], ids[1:], strict=True)]
        # completions echo the prompt followed by one new token
        reply = self._calls.ask(COMPLETIONS_PATH,
                                {"prompt": list(ids), "model": self._get_model_name(), "max_tokens": 1,
                                 "temperature": 1.0, "echo": True, "logprobs": 0,
                                 "request_id": uuid.uuid4().hex})
        with parse_answer(self.url):
            return [float(value) for value in reply["choices"][0]["logprobs"]["token_logprobs"][1:len(ids)]]

    def abort(self, requests: Sequence[TokenRequest]) -> None:
        """Abort requests; blocked `write` calls return the partial answers."""
        # each route prefixes request ids; vLLM ignores unknown ids
        request_ids: list[str] = []
        for request in requests:
            request_ids.append(f"generate-tokens-{request.name}")
            request_ids += [f"cmpl-{request.name}-{index}" for index in range(len(request.prompts))]
        self._calls.tell("/abort_requests", {"request_ids": request_ids})

    def pause(self) -> None:
        """Suspend running requests."""
        self._calls.tell("/pause?mode=keep&clear_cache=false")

    def update(self, files: Sequence[str], version: int) -> None:
        """Load new weights while paused.

        Args:
            files: safetensors files readable by the server's machine, with Hugging Face tensor names.
            version: version number for answers with these weights.
        """
        self._calls.tell("/init_weight_transfer_engine", {"init_info": {}})
        self._start_update()
        if self._send is None:
            self._calls.tell("/update_weights", {"update_info": {"files": list(files)}})
        else:
            self._transfer_weights(files, self._send)
        self._calls.tell("/finish_weight_update", {"weight_version": str(version)})

    def resume(self) -> None:
        """Continue suspended requests after recomputing their keys and values."""
        # without this reset, running requests would continue from keys and values of the old weights
        reply = self._calls.tell("/reset_prefix_cache?reset_running_requests=true")
        if isinstance(reply, Mapping) and reply.get("success") is False:
            raise BadAnswer(f"{self.url}: keeps keys and values of the weights before; its log says why")
        self._calls.tell("/resume")

    def is_healthy(self) -> bool:
        """Return whether the server answers and its model is loaded."""
        return self._calls.is_there("/health")

    def _start_update(self) -> None:
        try:
            self._calls.tell("/start_weight_update")
        except BadAnswer as e:
            # a killed trainer left its update open; new weights overwrite it
            if "already active" not in str(e):
                raise
            self._calls.tell("/finish_weight_update")
            self._calls.tell("/start_weight_update")

    def _transfer_weights(self, files: Sequence[str], send: SendFiles) -> None:
        reply = self._calls.look("/get_world_size")
        with parse_answer(self.url):
            num_workers = int(reply["world_size"])
        try:
            send(files, self.url, num_workers,
                 lambda group: self._calls.tell("/update_weights", {"update_info": {"group": dict(group)}}))
        except (RuntimeError, OSError) as e:
            raise BadAnswer(f"{self.url}: the weights did not arrive ({first_error_line(e)})",
                            is_unavailable=True) from None

    def _request_completions(self, request: TokenRequest, sampling: Mapping[str, Any]) -> list[TokenAnswer]:
        # send ids instead of text: our servers have no tokenizer
        body = dict(sampling) | {"prompt": request.prompts if request.others else list(request.ids),
                                 "model": self._get_model_name(), "return_token_ids": True,
                                 "return_tokens_as_token_ids": True, "request_id": request.name}
        reply = self._calls.ask(COMPLETIONS_PATH, body)
        with parse_answer(self.url):
            return [TokenAnswer(check_token_ids(choice["token_ids"]),
                                [float(value) for value in choice["logprobs"]["token_logprobs"]],
                                str(choice["finish_reason"])) for choice in reply["choices"]]

    def _get_model_name(self) -> str:
        if not self._model:
            reply = self._calls.look("/v1/models")
            with parse_answer(self.url):
                self._model = str(reply["data"][0]["id"])
        return self._model


def _parse_choices(reply: Any, url: str) -> list[TokenAnswer]:
    """Parse the choices from `/inference/v1/generate`."""
    with parse_answer(url):
        return [_parse_choice(choice) for choice in reply["choices"]]


def _parse_choice(choice: Mapping[str, Any]) -> TokenAnswer:
    tokens = check_token_ids(choice["token_ids"] or [])
    # an aborted request that had not started reports no log-probabilities
    logprobs = (choice.get("logprobs") or {"content": []})["content"]
    spans = tuple(VersionSpan(parse_version(span["version"]), int(span["start"]), int(span["end"]))
                  for span in choice.get("weight_versions") or [])
    return TokenAnswer(tokens, [float(place["logprob"]) for place in logprobs], str(choice["finish_reason"]),
                       spans if tokens else (), _decode_routes(choice.get("routed_experts")))


def _decode_routes(encoded: str | None) -> np.ndarray | None:
    """Decode a base64 `.npy` array with `allow_pickle=False`."""
    if encoded is None:
        return None
    array: np.ndarray = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    # archives of arrays and float arrays are invalid
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise ValueError("routes that are no array of whole numbers")
    return array
