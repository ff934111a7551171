"""SGLang's own server (0.5.23) as a `TokenServer`: `/generate`, and the routes that change it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.work.endpoints.answers import BadAnswer
from megatron_sov.work.endpoints.token_server import (
    ABORTED, AnswerReading, ServerCalls, TokenAnswer, TokenRequest, VersionSpan, check_answers, version_of,
    whole_ids)

if TYPE_CHECKING:
    import numpy as np

SGLANG = "sglang"
"""The engine by name."""
WRITE, ABOUT = "/generate", "/model_info"
MOST_OF_CUT = 4096
"""Tokens to draw from where a distribution is cut: SGLang tells log-probabilities of a cut one only up to so
many (--sampling-mask-max-tokens)."""


class SglangServer:
    """One address of SGLang.

    Args:
        url: the address, without a path.
        key_env: variable of the environment with the key; none is sent where it is not set.
        answer_s: how long an answer may take.
    """

    def __init__(self, url: str, key_env: str = "", answer_s: float = 3600.0) -> None:
        self._calls = ServerCalls(url, key_env, answer_s)
        self.url = self._calls.url
        self._is_paused = False

    def write(self, request: TokenRequest) -> list[TokenAnswer]:
        """Return continuations, see `TokenServer`."""
        # greedy is top_k 1 to SGLang, whose log-probabilities are those of all tokens
        is_cut = bool(request.temperature) and (request.top_p < 1 or request.top_k > 0)
        chosen: dict[str, Any] = {
            "max_new_tokens": request.max_new_tokens, "temperature": request.temperature,
            "ignore_eos": True, "stop_token_ids": list(request.stop_ids)}
        if is_cut:
            chosen |= {"top_p": request.top_p, "top_k": min(request.top_k or MOST_OF_CUT, MOST_OF_CUT)}
        asked = [ids for ids in request.prompts for _ in range(request.count)]
        found = self._calls.ask(WRITE, {
            # a list, in which each has a name to be aborted by: those of its own `n` have none
            "rid": _ids_of(request), "input_ids": asked,
            "sampling_params": chosen,
            "return_logprob": True, "return_sampling_mask": is_cut,
            "return_routed_experts": request.with_routes})
        with AnswerReading(self.url):
            answers = [_read(answer, len(ids), is_cut) for ids, answer in zip(asked, found, strict=True)]
        return check_answers(answers, request.num_answers, self.url)

    def score(self, ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of what is given, see `TokenServer`."""
        found = self._calls.ask(WRITE, {
            "input_ids": list(ids), "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0}})
        with AnswerReading(self.url):
            told = found["meta_info"]["input_token_logprobs"]
            if [int(token) for _, token, *_ in told] != list(ids):
                raise ValueError("input_token_logprobs are of other tokens")
            return [float(logprob) for logprob, *_ in told[1:]]

    def abort(self, requests: Sequence[TokenRequest]) -> None:
        """End requests, see `TokenServer`."""
        for request in requests:
            for name in _ids_of(request):
                self._calls.tell("/abort_request", {"rid": name})

    def pause(self) -> None:
        """Put what is under way back into SGLang's queue with its tokens, see `TokenServer`."""
        self._is_paused = True
        # keys and values of the old weights go; "in_place" would go on behind them
        self._calls.tell("/pause_generation", {"mode": "retract"})

    def update(self, files: Sequence[str], version: int) -> None:
        """Have it read a folder of files, see `TokenServer`."""
        # without `flush_cache` later prompts would be continued behind keys of the old weights
        self._order("/update_weights_from_disk", {
            "model_path": str(Path(files[0]).parent), "weight_version": str(version), "flush_cache": True})

    def resume(self) -> None:
        """Compute keys and values of what is under way anew, and go on, see `TokenServer`."""
        self._calls.tell("/continue_generation")
        self._is_paused = False

    def is_healthy(self) -> bool:
        """Return whether its processes answer; while it is paused, whether its first one does."""
        # its /health has a token written, which waits for the end of a pause
        return self._calls.is_there("/ping" if self._is_paused else "/health")

    def _order(self, path: str, payload: Mapping[str, Any]) -> None:
        said = self._calls.tell(path, payload)
        if not isinstance(said, Mapping) or not said.get("success"):
            raise BadAnswer(f"{self.url}{path}: {said}")


def _ids_of(request: TokenRequest) -> list[str]:
    # SGLang aborts all requests whose ids begin with what it is given
    return [f"{request.name}.{place};" for place in range(request.num_answers)]


def _read(found: Any, num_prompt: int, is_cut: bool) -> TokenAnswer:
    about = found["meta_info"]
    tokens = whole_ids(found["output_ids"])
    reason = str(about["finish_reason"]["type"])
    # one that was aborted before it began has none of them
    told = about.get("output_token_sampling_logprobs" if is_cut else "output_token_logprobs") or []
    logprobs = [float(value if is_cut else value[0]) for value in told]
    if reason == ABORTED:
        # tokens come in parts, and an end in the queue may come between
        tokens = tokens[:len(logprobs)]
        logprobs = logprobs[:len(tokens)]
    spans = [VersionSpan(version_of(span["version"]), int(span["start"]), min(int(span["end"]), len(tokens)))
             for span in about.get("weight_versions") or [] if int(span["start"]) < len(tokens)]
    return TokenAnswer(tokens, logprobs, reason, tuple(spans),
                       _routes(about.get("routed_experts"), num_prompt + len(tokens) - 1))


def _routes(told: str | None, num_tokens: int) -> np.ndarray | None:
    """Return [tokens read, layers x experts of a token]: SGLang sends numbers without a shape."""
    import numpy as np

    if told is None:
        return None
    return np.frombuffer(base64.b64decode(told), dtype=np.int32).reshape(num_tokens, -1)


def is_sglang(url: str, key_env: str = "") -> bool:
    """Return whether the server at an address is SGLang."""
    calls = ServerCalls(url, key_env, 0)
    try:
        return "is_generation" in calls.look(ABOUT)
    except (BadAnswer, TimeoutError, TypeError):
        return False
