"""Client for an OpenAI-compatible endpoint: retries, rate and cost limits, cached answers."""

import contextlib
import json
import os
import random
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megatron_sov.base.errors import UserError
from megatron_sov.work.endpoints.answers import (
    MAX_WAIT_S, NO_TOOLS_PHRASES, BadAnswer, EndpointUnavailable, RequestRefused, find_permanent_refusal,
    parse_json_answer, parse_retry_after, read_error_text, read_model_name, read_usage)
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.endpoints.transport import Transport

T = TypeVar("T")
UNAVAILABLE_STATUSES = frozenset([429, 502, 503, 504, 529])
"""HTTP status codes of an overloaded or unreachable endpoint."""
RETRIED_STATUSES = UNAVAILABLE_STATUSES | {408, 409, 425, 500}
FATAL_STATUSES = {401: "the key is not accepted", 402: "the account has no money", 403: "access is denied",
                  404: "there is no such address or model"}
"""Errors that affect every request: the command stops, and resumes when run again."""
REFUSED_STATUSES = frozenset([400, 413, 422])
REPORT_AFTER_S = 5.0
"""Shorter waits are not reported."""


@dataclass(frozen=True)
class EndpointLimits:
    """Limits of time, attempts, rate and cost for requests to an endpoint."""

    timeout_s: float
    """Timeout of one attempt."""
    max_attempts: int
    backoff_s: float
    """Wait before the second attempt; doubled before each further attempt."""
    requests_per_minute: float
    """0: unlimited."""
    max_cost: float
    """Limit of the cache's total cost, in the currency of the prices; 0: unlimited."""
    input_price: float
    """Price per million tokens."""
    output_price: float
    patience_s: float = 0.0
    """How long an overloaded or unreachable endpoint is retried beyond `max_attempts`, from its last answer
    to any request; then it counts as unavailable. 0: no such retries."""


class RateGate(Protocol):
    """Admission control for attempts, e.g. a budget."""

    def enter(self, most: Usage) -> None:
        """Admit a request with maximum billing `most`; may wait or raise."""

    def leave(self, most: Usage, billed: Usage) -> None:
        """Record the actual billing of an admitted request."""


class OpenGate:
    """Gate without limits."""

    def enter(self, most: Usage) -> None:
        """Admit every request."""

    def leave(self, most: Usage, billed: Usage) -> None:
        """Do nothing."""


class Endpoint:
    """Client for a single address, usable from any thread.

    Args:
        url: address for POST requests.
        key_env: environment variable with the API key; unset sends no key.
        limits: rate, cost and attempts.
        cache: answers to earlier requests.
        cache_name: replaces the address in cache keys; empty: the address.
        model: name of the model at the address.
        gate: admits each attempt.
        sleep: waits; may raise to abort.
        report: called with a message when waiting for an overloaded or unreachable endpoint begins.
        key: API key for a private server; overrides `key_env`.
        transform: transforms a request before sending; cache and billing use the original.
        accepted_models: names of models whose answers to a request for another model are used; None: all.
    """

    def __init__(self, url: str, key_env: str, limits: EndpointLimits, cache: EndpointCache, *,
                 cache_name: str = "", model: str = "",
                 gate: RateGate | None = None, sleep: Callable[[float], object] = time.sleep,
                 report: Callable[[str], object] = lambda sentence: None, key: str = "",
                 transform: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
                 accepted_models: Collection[str] | None = None) -> None:
        self._url, self._key_env, self._limits, self._cache = url, key_env, limits, cache
        self.model = model
        self._cache_name, self._gate, self._sleep = cache_name or url, gate or OpenGate(), sleep
        self._transport = Transport(url, key_env, limits.timeout_s, key)
        self._transform = transform
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._locks_by_key: dict[str, tuple[threading.Lock, int]] = {}
        """Cache key of a request under way -> (lock, threads that wait for the answer)."""
        self.answered_s = time.monotonic()
        """Time of the last answer (or creation), by the monotonic clock."""
        self._report, self._reported_s = report, float("-inf")
        self._accepted_models = accepted_models
        self._reported_models: set[str] = set()

    def key(self, payload: Mapping[str, Any]) -> str:
        return self._cache.key(self._cache_name, payload)

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return `read` applied to the endpoint's answer, from the cache if possible.

        Concurrent equal requests wait for a single answer.

        Args:
            payload: the request.
            read: converts the decoded JSON. It raises `BadAnswer` for unusable answers to retry, and other
                exceptions for valid answers without use, which are cached.

        Raises:
            TimeoutError: the last attempt timed out.
            BadAnswer: no usable answer; `RequestRefused`: permanently refused; `EndpointUnavailable`:
                patience ended.
            Exception: raised by `read`, also for a cached answer.
            UserError: no request can succeed, or the cost limit is reached.
        """
        key = self.key(payload)
        with self._lock_request(key):
            cached = self._cache.get(key)
            if cached is not None and self._find_substitute_model(payload, cached) is None:
                with contextlib.suppress(BadAnswer):  # an answer that another `read` accepted: ask again
                    return read(cached)
            return self._ask_until_answered(payload, key, read)

    @contextlib.contextmanager
    def _lock_request(self, key: str) -> Iterator[None]:
        """Lock a request key: the first thread sends the request, later threads then find it in the cache."""
        with self._lock:
            # one lock per request in progress, dropped with its last waiter, so that the table does not grow
            lock, num_waiting = self._locks_by_key.get(key, (threading.Lock(), 0))
            self._locks_by_key[key] = lock, num_waiting + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, num_waiting = self._locks_by_key.pop(key)
                if num_waiting > 1:
                    self._locks_by_key[key] = lock, num_waiting - 1

    def _ask_until_answered(self, payload: Mapping[str, Any], key: str, read: Callable[[Any], T]) -> T:
        """Send a request until `read` accepts an answer, up to `max_attempts`, or for `patience_s` while the
        endpoint is overloaded or unreachable."""
        limits, began_s, attempt = self._limits, time.monotonic(), 0
        while True:
            attempt += 1
            self._wait_for_turn()
            try:
                answer = self._send_request(payload, key, read)
            except RequestRefused:
                raise
            except (TimeoutError, BadAnswer) as e:
                is_away = getattr(e, "is_unavailable", False)
                if attempt >= limits.max_attempts:
                    # patience counts from the endpoint's last answer to any request
                    waited_s = time.monotonic() - max(began_s, self.answered_s)
                    if limits.patience_s and waited_s >= limits.patience_s:
                        raise EndpointUnavailable(f"{self._url}: {e}, for {waited_s:.0f} s") from None
                    if not is_away or not limits.patience_s:
                        raise
                if is_away:
                    self._report_wait(str(e))
                # jitter, so that threads that failed together do not retry together
                wait_s = limits.backoff_s * 2 ** min(attempt - 1, 20) * random.uniform(0.5, 1.0)
                self._sleep(min(max(wait_s, getattr(e, "wait_s", 0.0)), MAX_WAIT_S))
            else:
                return answer

    def _find_substitute_model(self, payload: Mapping[str, Any], answer: Any) -> str | None:
        """Return the model that answered, if it is neither requested nor in `accepted_models`; else None."""
        if self._accepted_models is None:
            return None
        name = read_model_name(answer)
        return None if name in ("", payload.get("model"), *self._accepted_models) else name

    def _check_model(self, payload: Mapping[str, Any], answer: Any) -> None:
        """Report a substitute model once per name. Raises `UserError`: it is not accepted."""
        name, requested = read_model_name(answer), payload.get("model")
        if name in ("", requested) or not isinstance(requested, str):
            return
        if self._find_substitute_model(payload, answer) is not None:
            raise UserError(f"{self._url}: was asked for model {requested!r}, and {name[:200]!r} answered; "
                            "its answer is not used. Run the same command again when the endpoint serves "
                            f"{requested!r}, or pass --accept-model {shlex.quote(name[:200])} to use the "
                            "answers of both")
        with self._lock:
            if name in self._reported_models:
                return
            self._reported_models.add(name)
        self._report(f"{self._url}: was asked for model {requested!r}, and {name[:200]!r} answers; the "
                     "answers are recorded with that name")

    def _report_wait(self, why: str) -> None:
        """Report a wait once, when the endpoint has not answered any request for `REPORT_AFTER_S`."""
        with self._lock:
            if time.monotonic() - self.answered_s < REPORT_AFTER_S or self._reported_s > self.answered_s:
                return
            self._reported_s = time.monotonic()
        self._report(f"{self._url}: {why}; waiting up to {self._limits.patience_s:.0f} s for it")

    def _wait_for_turn(self) -> None:
        """Wait for the next slot of `requests_per_minute`. Raises `UserError`: the cost limit is reached."""
        limits = self._limits
        if limits.max_cost and (spent := self._cache.cost()) >= limits.max_cost:
            raise UserError(f"max_cost = {limits.max_cost:g}: the endpoint has cost {spent:.4f} so far; "
                            "raise it and run the same command again: what is scored is kept")
        if not limits.requests_per_minute:
            return
        with self._lock:
            now_s = time.monotonic()
            # reserve the slot under the lock, wait outside
            turn_s = max(self._next_s, now_s)
            self._next_s = turn_s + 60 / limits.requests_per_minute
        self._sleep(turn_s - now_s)

    def _send_request(self, payload: Mapping[str, Any], key: str, read: Callable[[Any], T]) -> T:
        """Send a request; return `read` of the answer. `EndpointCache` stores answer and cost together."""
        max_usage = self._max_usage(payload)
        # a budget reserves the worst case before sending; `leave` corrects it
        self._gate.enter(max_usage)
        outcome, usage, answer, began_s = "no answer", Usage(0, 0, 0.0), None, time.monotonic()
        try:
            response = self._transport.post(self._transform(payload))
            outcome = str(response.status_code)
            self._check_status(response.status_code, response.headers.get("retry-after"), response.content)
            usage = max_usage  # also if the answer was truncated in transit
            content = parse_json_answer(response.content)
            usage = self._read_billing(content, max_usage)
            self._check_model(payload, content)
            try:
                result = read(content)
            except BadAnswer:
                raise
            except Exception:  # the answer is valid, so the cache keeps it
                answer = content
                raise
            answer, self.answered_s = content, time.monotonic()
            return result
        except TimeoutError:
            outcome = "timeout"
            raise
        finally:
            try:
                self._cache.note(key, outcome, usage, time.monotonic() - began_s, answer)
            finally:
                self._gate.leave(max_usage, usage)

    def _check_status(self, status: int, retry_after: str | None, body: bytes) -> None:
        """Raise `UserError`, `BadAnswer` or `RequestRefused` unless the status is 200."""
        if status in FATAL_STATUSES:
            raise UserError(f"{self._url}: {FATAL_STATUSES[status]} (HTTP {status}); check the address, the "
                            f"model and the key in {self._key_env}, and run the same command again")
        if status in RETRIED_STATUSES:
            raise BadAnswer(f"the endpoint answered HTTP {status}", parse_retry_after(retry_after),
                            status in UNAVAILABLE_STATUSES)
        if status in REFUSED_STATUSES and (why := find_permanent_refusal(body)):
            raise RequestRefused(f"the request is {why} (HTTP {status})")
        key = os.environ.get(self._key_env, "")
        reason = read_error_text(body, key) if status in REFUSED_STATUSES else ""
        if any(word in reason for word in NO_TOOLS_PHRASES):
            raise UserError(f"{self._url}: is not set up for calls of tools (HTTP {status}); start vLLM with "
                            "--enable-auto-tool-choice --tool-call-parser NAME (hermes for Qwen), llama.cpp "
                            "with --jinja, or ask another model, and run the same command again")
        if status != 200:
            raise BadAnswer(f"the endpoint answered HTTP {status}" + (f": {reason}" if reason else ""))

    def _max_usage(self, payload: Mapping[str, Any]) -> Usage:
        """Return the maximum billing of a request: a token has at least one byte."""
        num_completion = payload.get("max_completion_tokens") or payload.get("max_tokens") or 0
        num_prompt = len(json.dumps(payload, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return self._compute_usage(num_prompt, num_completion if isinstance(num_completion, int) else 0)

    def _read_billing(self, answer: Any, most: Usage) -> Usage:
        """Return an answer's billing, or the maximum `most` if the answer states no usage."""
        counts = read_usage(answer)
        return most if counts is None else self._compute_usage(*counts)

    def _compute_usage(self, num_prompt: int, num_completion: int) -> Usage:
        limits = self._limits
        cost = (num_prompt * limits.input_price + num_completion * limits.output_price) / 1e6
        return Usage(num_prompt, num_completion, cost)
