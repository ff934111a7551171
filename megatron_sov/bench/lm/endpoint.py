"""Requests answered by an OpenAI-compatible endpoint, as vLLM, SGLang and others serve it.

Texts come from `/completions`, with a chat template from `/chat/completions`; likelihoods from `/completions`
with `echo` and `logprobs`, which not every endpoint has.  Requests, retries and the key are those of room
`endpoints`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, warn
from megatron_sov.bench.lm.answers import Answer, AnswerScore, Request, Write
from megatron_sov.bench.lm.settings import OTHER_MODEL, EndpointModel, EndpointSettings
from megatron_sov.infer.request import LENGTH, STOP
from megatron_sov.train.stopping import StopFlag
from megatron_sov.work.endpoints.answers import CHAT_PROBES, TEXT_PROBES, BadAnswer, Recognition
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.endpoints.endpoint import Endpoint, EndpointLimits
from megatron_sov.work.progress.progress_bar import work_bar

LIMITS = EndpointLimits(timeout_s=600.0, max_attempts=5, backoff_s=1.0, requests_per_minute=0.0, max_cost=0.0,
                        input_price=0.0, output_price=0.0)
"""Ten minutes are enough for an answer of a reasoning model; an item whose request has failed five times has
failed, and the same command asks it again."""
CACHE = "endpoint.sqlite"
MAX_STOPS = 4
"""Stop strings that endpoints take; what comes behind others is cut here."""
NO_ECHO = ("tells no likelihoods of what it is given (echo with logprobs), as many do not; evaluate a "
           "checkpoint or folder, or leave tasks out that compare likelihoods")


def endpoint_at(url: str, settings: EndpointModel, cache: EndpointCache, probes: Sequence[Mapping[str, Any]],
                sleep: Callable[[float], object] = time.sleep) -> Endpoint:
    """Return what asks the model at an address for answers that are kept."""
    recognition = Recognition(settings.model, probes, OTHER_MODEL, settings.same_model)
    return Endpoint(url, settings.key_env, LIMITS, cache, sleep=sleep, told=warn, recognition=recognition)


class AsksEndpoint:
    """Asks one endpoint."""

    def __init__(self, url: str, settings: EndpointSettings, folder: Path, answers: dict[str, Answer]
                 ) -> None:
        self._cache = EndpointCache(folder / CACHE)
        base = url.rstrip("/")
        self._settings, self._answers = settings, answers
        self._texts, self._chats = (
            endpoint_at(f"{base}/{path}", settings, self._cache, probes)
            for path, probes in (("completions", TEXT_PROBES), ("chat/completions", CHAT_PROBES)))

    def recall(self, requests: Sequence[Request]) -> None:
        """Take in what was answered before.

        Raises:
            UserError: the model is not the one whose answers are kept, under the same address and name.
        """
        for request in requests:
            endpoint, payload, read = self._asking(request)
            if (kept := self._cache.get(endpoint.key(payload))) is not None:
                with contextlib.suppress(BadAnswer):  # kept by other code
                    self._answers[request.key] = read(kept)

    def answer(self, requests: Sequence[Request], flag: StopFlag) -> bool:
        """Answer requests; returns whether it was asked to stop before the end.

        What is not answered after all attempts is noted as failed, for this time alone.

        Raises:
            UserError: no request can succeed: the key, the address, or no likelihoods.
        """
        left = [request for request in requests if request.key not in self._answers]
        with (work_bar("ask", len(requests), "request") as bar,
              ThreadPoolExecutor(self._settings.concurrent) as pool):
            bar.update(len(requests) - len(left))
            under_way = {pool.submit(self._ask, request): request for request in left}
            try:
                for future in as_completed(under_way):
                    try:
                        found = future.result()
                    except (BadAnswer, TimeoutError) as e:
                        found = {"failed": str(e)}
                    self._answers[under_way[future].key] = found
                    bar.update(1)
                    if flag.reason is not None:
                        return True
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return False

    def _ask(self, request: Request) -> Answer:
        endpoint, payload, read = self._asking(request)
        return endpoint.ask(payload, read)

    def _asking(self, request: Request) -> tuple[Endpoint, dict[str, Any], Callable[[Any], Answer]]:
        """Return who is asked what, and what reads the answer."""
        if isinstance(request, AnswerScore):
            tokens = [*request.context, *request.continuation]
            return (self._texts, {"model": self._settings.model, "prompt": tokens, "max_tokens": 1,
                                  "temperature": 0, "logprobs": 1, "echo": True},
                    lambda raw: _likelihood(raw, len(request.context), len(tokens)))
        payload: dict[str, Any] = {"model": self._settings.model, "max_tokens": request.max_tokens,
                                   "temperature": request.temperature}
        if request.until:
            payload["stop"] = list(request.until[:MAX_STOPS])
        if request.temperature:
            payload |= {"top_p": request.top_p, "seed": (request.seed + request.stream) % 2**31}
            payload |= {"top_k": request.top_k} if request.top_k else {}
        if request.chat:
            payload |= json.loads(str(request.prompt))
        else:
            payload["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        return (self._chats if request.chat else self._texts, payload,
                lambda raw: _text(raw, request, request.chat))


def _choice(raw: Any) -> dict[str, Any]:
    try:
        choice = raw["choices"][0]
    except (TypeError, KeyError, IndexError):
        raise BadAnswer("the endpoint sent an answer without choices") from None
    if not isinstance(choice, dict):
        raise BadAnswer("the endpoint sent a choice that is no object")
    return choice


def _text(raw: Any, request: Write, chat: bool) -> Answer:
    choice = _choice(raw)
    message = choice.get("message") if chat else choice
    text = message.get("content" if chat else "text") if isinstance(message, dict) else None
    if chat and text is None and isinstance(message, dict):
        text = ""  # all of it was reasoning, which was cut at the limit
    if not isinstance(text, str):
        raise BadAnswer("the endpoint sent a choice without text")
    for stop in request.until:
        text = text.split(stop)[0]
    return {"text": text, "finish_reason": LENGTH if choice.get("finish_reason") == "length" else STOP}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _likelihood(raw: Any, start: int, end: int) -> Answer:
    """Return the likelihood of tokens `start` to `end` of what was echoed.

    Raises:
        UserError: nothing was echoed.
        BadAnswer: what was echoed has other tokens.
    """
    found = _choice(raw).get("logprobs")
    logprobs = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(logprobs, list) or len(logprobs) < end:
        raise UserError(f"the endpoint {NO_ECHO}")
    asked = logprobs[start:end]
    if not all(_is_number(value) for value in asked):
        raise BadAnswer("the endpoint told no likelihood of some tokens")
    best = found.get("top_logprobs")
    greedy = isinstance(best, list) and all(
        isinstance(top, dict) and bool(top) and all(map(_is_number, top.values()))
        and value >= max(top.values()) for value, top in zip(asked, best[start:end], strict=False))
    return {"logprob": float(sum(asked)), "greedy": greedy}
