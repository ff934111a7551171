"""An OpenAI-compatible endpoint: requests with retries, limits of rate and cost, and answers kept on disk.

httpx is imported when the first request is made (extra `judge`).  The key is read from the environment,
stands in a header and nowhere else: no message quotes what an endpoint says.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_sov.endpoints.cache import EndpointCache, Usage
from megatron_sov.errors import UserError

T = TypeVar("T")
MAX_BODY_BYTES = 8 << 20
MAX_WAIT_S = 60.0
"""Between two attempts, whatever the endpoint asks for."""
RETRIED = frozenset([408, 409, 425, 429, 500, 502, 503, 504, 529])
HOPELESS = {401: "the key is not accepted", 402: "the account has no money", 403: "access is denied",
            404: "there is no such address or model"}
"""What will meet every row: the command ends, and goes on where it was."""


class BadAnswer(Exception):
    """What an endpoint sent is no answer, and may be one at another attempt."""

    def __init__(self, said: str, wait_s: float = 0.0) -> None:
        """Take what is wrong, and how long the endpoint asks to be left alone."""
        super().__init__(said)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Limits:
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


class Endpoint:
    """Asks one address, from any thread.

    Args:
        url: the address that requests are posted to.
        key_env: variable of the environment with the key; none is sent where it is not set.
        limits: rate, cost, attempts.
        cache: what was answered before.
    """

    def __init__(self, url: str, key_env: str, limits: Limits, cache: EndpointCache) -> None:
        self._url, self._key_env, self._limits, self._cache = url, key_env, limits, cache
        self._lock = threading.Lock()
        self._client: Any = None
        self._next_s = 0.0

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the endpoint's answer; what was answered once is not asked again.

        Args:
            payload: the request.
            read: takes the decoded JSON; raises `BadAnswer` for what is no answer and is asked for again, and
                another exception for an answer that is kept and of no use.

        Raises:
            TimeoutError: the last attempt took too long.
            BadAnswer: there was no usable answer.
            Exception: what `read` raises besides, now or of a kept answer.
            UserError: no request can succeed, or the money is spent.
        """
        key = self._cache.key(self._url, payload)
        kept = self._cache.get(key)
        if kept is not None:
            with contextlib.suppress(BadAnswer):  # kept by other code
                return read(kept)
        attempt = 0
        while True:
            attempt += 1
            self._wait_for_turn()
            try:
                answer = self._attempt(payload, key)
                try:
                    found = read(answer)
                except BadAnswer:
                    raise
                except Exception:  # an answer too, and billed
                    self._cache.put(key, answer)
                    raise
            except (TimeoutError, BadAnswer) as e:
                if attempt >= self._limits.max_attempts:
                    raise
                wait_s = self._limits.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(max(wait_s, getattr(e, "wait_s", 0.0)), MAX_WAIT_S))
            else:
                self._cache.put(key, answer)
                return found

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
            turn_s = max(self._next_s, now_s)
            self._next_s = turn_s + 60 / limits.requests_per_minute
        time.sleep(turn_s - now_s)

    def _attempt(self, payload: Mapping[str, Any], key: str) -> Any:
        """Return the decoded answer of one request, which is noted with its cost whatever it is."""
        import httpx

        outcome, usage = "no answer", Usage(0, 0, 0.0)
        try:
            status, headers, body = self._post(payload)
            outcome = str(status)
            if status in HOPELESS:
                raise UserError(f"{self._url}: {HOPELESS[status]} (HTTP {status}); look at the address, the "
                                f"model and the key in {self._key_env}, and run the same command again")
            if status in RETRIED:
                raise BadAnswer(f"the endpoint answered HTTP {status}", _seconds(headers.get("retry-after")))
            if status != 200:
                raise BadAnswer(f"the endpoint answered HTTP {status}")
            answer = _decoded(body)
            usage = self._usage(answer)
            return answer
        except httpx.TimeoutException:
            outcome = "timeout"
            raise TimeoutError(f"the endpoint took longer than {self._limits.timeout_s:g} s") from None
        except httpx.HTTPError as e:
            raise BadAnswer(f"the connection failed ({type(e).__name__})") from None
        finally:
            self._cache.note(key, outcome, usage)

    def _post(self, payload: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body of one request."""
        import httpx

        with self._lock:
            if self._client is None:
                self._client = httpx.Client(timeout=self._limits.timeout_s,
                                            limits=httpx.Limits(max_connections=None),
                                            # reading all certificates takes long, and plain HTTP has none
                                            verify=self._url.startswith("https:"))
        secret = os.environ.get(self._key_env, "") if self._key_env else ""
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        deadline_s = time.monotonic() + self._limits.timeout_s
        body = bytearray()
        with self._client.stream("POST", self._url, json=payload, headers=headers) as response:
            for block in response.iter_bytes():
                body += block
                if len(body) > MAX_BODY_BYTES:
                    raise BadAnswer(f"the endpoint sent more than {MAX_BODY_BYTES >> 20} MiB")
                if time.monotonic() > deadline_s:
                    raise httpx.ReadTimeout("dripping")
            return response.status_code, response.headers, bytes(body)

    def _usage(self, answer: Any) -> Usage:
        """Return what an answer says that it was billed for; 0 where it says nothing sound."""
        said = answer.get("usage") if isinstance(answer, dict) else None
        read, wrote = (_count(said.get(name)) if isinstance(said, dict) else 0
                       for name in ("prompt_tokens", "completion_tokens"))
        limits = self._limits
        return Usage(read, wrote, (read * limits.input_price + wrote * limits.output_price) / 1e6)


def _count(said: Any) -> int:
    return said if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 10**9 else 0


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        looks = "HTML" if body.lstrip()[:1] == b"<" else "no JSON, or a part of it"
        raise BadAnswer(f"the endpoint sent {looks}") from None


def _seconds(text: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 for a date or nonsense."""
    try:
        return min(max(float(text or 0), 0.0), MAX_WAIT_S)
    except ValueError:
        return 0.0
