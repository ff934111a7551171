"""An OpenAI-compatible endpoint: requests with retries, limits of rate and cost, and answers kept on disk."""

from __future__ import annotations

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
    MAX_WAIT_S, NO_TOOLS, BadAnswer, EndpointUnavailable, NeverAnswered, answering_model, decoded, reason_of,
    seconds, told_tokens, why_never)
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.endpoints.transport import Transport

T = TypeVar("T")
AWAY = frozenset([429, 502, 503, 504, 529])
"""The endpoint is full, or not there."""
RETRIED = AWAY | {408, 409, 425, 500}
HOPELESS = {401: "the key is not accepted", 402: "the account has no money", 403: "access is denied",
            404: "there is no such address or model"}
"""What will meet every row: the command ends, and goes on where it was."""
REFUSED = frozenset([400, 413, 422])
TOLD_S = 5.0
"""Waiting that is shorter is not told."""


@dataclass(frozen=True)
class EndpointLimits:
    """How an endpoint may be used."""

    timeout_s: float
    """For an attempt as a whole."""
    max_attempts: int
    """For a request."""
    backoff_s: float
    """Before the second attempt; twice as much before each further one."""
    requests_per_minute: float
    """0: as fast as the threads are."""
    max_cost: float
    """Of all requests of the cache together, in the currency of the prices; 0: no limit."""
    input_price: float
    """Of a million tokens."""
    output_price: float
    """Of a million tokens."""
    patience_s: float = 0.0
    """How long an endpoint that is full or not there is asked beyond `max_attempts`, since it last answered
    anybody."""


class RateGate(Protocol):
    """What lets requests pass, such as a budget."""

    def enter(self, most: Usage) -> None:
        """Let a request pass that may be billed as much as `most`; may wait, or raise."""
        ...

    def leave(self, most: Usage, billed: Usage) -> None:
        """Note what a request that has passed was billed."""
        ...


class OpenGate:
    """Lets everything pass."""

    def enter(self, most: Usage) -> None:
        """Let it pass."""

    def leave(self, most: Usage, billed: Usage) -> None:
        """Note nothing."""


class Endpoint:
    """Asks one address, from any thread.

    Args:
        url: the address that requests are posted to.
        key_env: variable of the environment with the key; none is sent where it is not set.
        limits: rate, cost, attempts.
        cache: what was answered before.
        known_as: stands for the address in what answers are kept by; empty: the address itself.
        gate: what each attempt has to pass.
        sleep: waits; may raise to end all waiting.
        told: is given a sentence when an endpoint that is full or not there begins to be waited for.
        key: the key itself, of a server of one's own; goes before the variable.
        sent: makes of a request what is sent; kept and counted is the request itself.
    """

    def __init__(self, url: str, key_env: str, limits: EndpointLimits, cache: EndpointCache, *,
                 known_as: str = "",
                 gate: RateGate | None = None, sleep: Callable[[float], object] = time.sleep,
                 told: Callable[[str], object] = lambda sentence: None, key: str = "",
                 sent: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
                 accepted_models: Collection[str] | None = None) -> None:
        self._url, self._key_env, self._limits, self._cache = url, key_env, limits, cache
        self._known_as, self._gate, self._sleep = known_as or url, gate or OpenGate(), sleep
        self._transport = Transport(url, key_env, limits.timeout_s, key)
        self._sent = sent
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._asking: dict[str, tuple[threading.Lock, int]] = {}
        self.answered_s = time.monotonic()
        """When it last answered, or was made, by the monotonic clock."""
        self._told, self._told_s = told, float("-inf")
        self._accepted_models = accepted_models
        self._names: set[str] = set()

    def key(self, payload: Mapping[str, Any]) -> str:
        return self._cache.key(self._known_as, payload)

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the endpoint's answer; what was answered once is not asked again, and
        what is being asked is waited for.

        Args:
            payload: the request.
            read: takes the decoded JSON; raises `BadAnswer` for what is no answer and is asked for again, and
                another exception for an answer that is kept and of no use.

        Raises:
            TimeoutError: the last attempt took too long.
            BadAnswer: there was no usable answer; `NeverAnswered`: there will be none;
                `EndpointUnavailable`: the endpoint's patience has ended.
            Exception: what `read` raises besides, now or of a kept answer.
            UserError: no request can succeed, or the money is spent.
        """
        key = self.key(payload)
        with self._alone(key):
            kept = self._cache.get(key)
            if kept is not None and self._other_model(payload, kept) is None:
                with contextlib.suppress(BadAnswer):  # kept by other code
                    return read(kept)
            return self._ask_until_answered(payload, key, read)

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Let one thread at a time ask a question: the others find its answer."""
        with self._lock:
            # a lock for each question that is under way, dropped with the last who waits: the table does not
            # grow
            lock, num_waiting = self._asking.get(key, (threading.Lock(), 0))
            self._asking[key] = lock, num_waiting + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, num_waiting = self._asking.pop(key)
                if num_waiting > 1:
                    self._asking[key] = lock, num_waiting - 1

    def _ask_until_answered(self, payload: Mapping[str, Any], key: str, read: Callable[[Any], T]) -> T:
        limits, began_s, attempt = self._limits, time.monotonic(), 0
        while True:
            attempt += 1
            self._wait_for_turn()
            try:
                answer = self._attempt(payload, key, read)
            except NeverAnswered:
                raise
            except (TimeoutError, BadAnswer) as e:
                is_away = getattr(e, "is_away", False)
                # an endpoint that is full answers later; since when counts from its last answer to anybody
                if attempt >= limits.max_attempts:
                    waited_s = time.monotonic() - max(began_s, self.answered_s)
                    if not is_away or not limits.patience_s:
                        raise
                    if waited_s >= limits.patience_s:
                        raise EndpointUnavailable(f"{self._url}: {e}, for {waited_s:.0f} s") from None
                if is_away:
                    self._tell(str(e))
                # jitter, so that threads that failed together do not come back together
                wait_s = limits.backoff_s * 2 ** min(attempt - 1, 20) * random.uniform(0.5, 1.0)
                self._sleep(min(max(wait_s, getattr(e, "wait_s", 0.0)), MAX_WAIT_S))
            else:
                return answer

    def _other_model(self, payload: Mapping[str, Any], answer: Any) -> str | None:
        """Return the name of the model that answered, if it is neither the requested nor an accepted one."""
        if self._accepted_models is None:
            return None
        name = answering_model(answer)
        return None if name in ("", payload.get("model"), *self._accepted_models) else name

    def _check_model(self, payload: Mapping[str, Any], answer: Any) -> None:
        """Report once each model that answers in place of the requested one.

        Raises:
            UserError: `accepted_models` are given and do not name it.
        """
        name, requested = answering_model(answer), payload.get("model")
        if name in ("", requested) or not isinstance(requested, str):
            return
        if self._other_model(payload, answer) is not None:
            raise UserError(f"{self._url}: was asked for model {requested!r}, and {name[:200]!r} answered; "
                            "its answer is not used. Run the same command again when the endpoint serves "
                            f"{requested!r}, or pass --accept-model {shlex.quote(name[:200])} to use the "
                            "answers of both")
        with self._lock:
            if name in self._names:
                return
            self._names.add(name)
        self._told(f"{self._url}: was asked for model {requested!r}, and {name[:200]!r} answers; the answers "
                   "are recorded with that name")

    def _tell(self, why: str) -> None:
        """Say once that the endpoint is waited for, when it has answered nobody for `TOLD_S`."""
        with self._lock:
            if time.monotonic() - self.answered_s < TOLD_S or self._told_s > self.answered_s:
                return
            self._told_s = time.monotonic()
        self._told(f"{self._url}: {why}; waiting up to {self._limits.patience_s:.0f} s for it")

    def _wait_for_turn(self) -> None:
        """Wait until the rate allows another request.

        Raises:
            UserError: the cost does not.
        """
        limits = self._limits
        if limits.max_cost and (spent := self._cache.cost()) >= limits.max_cost:
            raise UserError(f"max_cost = {limits.max_cost:g}: the endpoint has cost {spent:.4f} so far; "
                            "raise it and run the same command again: what is scored is kept")
        if not limits.requests_per_minute:
            return
        with self._lock:
            now_s = time.monotonic()
            # the turn is taken under the lock, the waiting is done outside of it
            turn_s = max(self._next_s, now_s)
            self._next_s = turn_s + 60 / limits.requests_per_minute
        self._sleep(turn_s - now_s)

    def _attempt(self, payload: Mapping[str, Any], key: str, read: Callable[[Any], T]) -> T:
        """Return what `read` makes of one request's answer.  The answer and what it was billed come to the
        disk together: a kill leaves both or none."""
        most = self._most(payload)
        # before the request leaves: a budget is reserved for the worst case, and corrected in `leave`
        self._gate.enter(most)
        outcome, usage, answer, began_s = "no answer", Usage(0, 0, 0.0), None, time.monotonic()
        try:
            came = self._transport.post(self._sent(payload))
            outcome = str(came.status)
            self._refuse(came.status, came.headers.get("retry-after"), came.body)
            usage = most  # also of an answer that was cut off on its way
            found = decoded(came.body)
            usage = self._billed(found, most)
            self._check_model(payload, found)
            try:
                made = read(found)
            except BadAnswer:
                raise
            except Exception:  # an answer too
                answer = found
                raise
            answer, self.answered_s = found, time.monotonic()
            return made
        except TimeoutError:
            outcome = "timeout"
            raise
        finally:
            try:
                self._cache.note(key, outcome, usage, time.monotonic() - began_s, answer)
            finally:
                self._gate.leave(most, usage)

    def _refuse(self, status: int, retry_after: str | None, body: bytes) -> None:
        """Raise for an answer that is not 200."""
        if status in HOPELESS:
            raise UserError(f"{self._url}: {HOPELESS[status]} (HTTP {status}); look at the address, the "
                            f"model and the key in {self._key_env}, and run the same command again")
        if status in RETRIED:
            raise BadAnswer(f"the endpoint answered HTTP {status}", seconds(retry_after), status in AWAY)
        if status in REFUSED and (why := why_never(body)):
            raise NeverAnswered(f"the request is {why} (HTTP {status})")
        reason = reason_of(body, os.environ.get(self._key_env, "")) if status in REFUSED else ""
        if any(word in reason for word in NO_TOOLS):
            raise UserError(f"{self._url}: is not set up for calls of tools (HTTP {status}); start vLLM with "
                            "--enable-auto-tool-choice --tool-call-parser NAME (hermes for Qwen), llama.cpp "
                            "with --jinja, or ask another model, and run the same command again")
        if status != 200:
            raise BadAnswer(f"the endpoint answered HTTP {status}" + (f": {reason}" if reason else ""))

    def _most(self, payload: Mapping[str, Any]) -> Usage:
        """Return the most that a request can be billed: no token is shorter than a byte."""
        wrote = payload.get("max_completion_tokens") or payload.get("max_tokens") or 0
        read = len(json.dumps(payload, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return self._usage(read, wrote if isinstance(wrote, int) else 0)

    def _billed(self, answer: Any, most: Usage) -> Usage:
        """Return what an answer was billed for; the most that it can be where it does not say."""
        told = told_tokens(answer)
        return most if told is None else self._usage(*told)

    def _usage(self, read: int, wrote: int) -> Usage:
        limits = self._limits
        return Usage(read, wrote, (read * limits.input_price + wrote * limits.output_price) / 1e6)
