"""One request over HTTP by the `openai` client, bounded in time and size; imported when the first is made.

The key is read from the environment for each request, stands in a header and nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from megatron_sov.base.errors import how_to_install
from megatron_sov.base.settings import ProblemCode, SettingsProblem
from megatron_sov.work.endpoints.answers import BadAnswer, NeverAnswered, reason_of, why_never


def is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def address_problems(field: str, text: str, key_field: str) -> list[SettingsProblem]:
    """Return what is wrong with an address up to `/v1`; it is not quoted, for it may hold a key.

    Args:
        field: that holds it.
        text: as it was written.
        key_field: that names the variable of the key.
    """
    p = []
    try:
        parts = urlsplit(text)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are not closed, a port that is none
        # the checks below read the parts of an address, also where there is none
        parts, is_sound = urlsplit(""), False
    if not is_sound:
        p.append("must be an address such as http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        p.append("must end before /chat/completions, which is added to it, such as "
                 "http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        p.append("holds a key or a query, which would come into files; put the key into the "
                 f"environment and name its variable with {key_field}")
    return [SettingsProblem(ProblemCode.RULE, field, rule) for rule in p]


MAX_BODY_BYTES = 8 << 20
KEPT_S = 2.0
"""For a connection that nothing is sent over: servers by uvicorn (vLLM, SGLang) hang up after 5 s, and a
request that is sent at that moment fails."""


@dataclass(frozen=True)
class Answered:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Names in small letters."""
    body: bytes


def missing_libraries() -> list[str]:
    """Return one sentence for each library that is needed and not installed."""
    return [f"{name} is not installed; {how_to_install('judge')}" for name in ("openai", "httpx")
            if importlib.util.find_spec(name) is None]


class Transport:
    """Posts JSON to one address, from any thread.

    Args:
        url: the address.
        key_env: variable of the environment with the key; none is sent where it is not set.
        timeout_s: for a request as a whole.
        key: the key itself, of a server of one's own; goes before the variable.
        max_bytes: of an answer; 0: `MAX_BODY_BYTES`.
    """

    def __init__(self, url: str, key_env: str, timeout_s: float, key: str = "",
                 max_bytes: int = 0) -> None:
        self._base, _, self._path = url.rpartition("/")
        self._is_secure = url.startswith("https:")
        self._is_here = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._key_env, self._timeout_s, self._key = key_env, timeout_s, key
        self._max_bytes = max_bytes or MAX_BODY_BYTES
        self._lock = threading.Lock()
        self._client: Any = None

    def post(self, payload: Mapping[str, Any], path: str = "") -> Answered:
        """Return what comes back, whatever its status.

        Args:
            payload: JSON.
            path: behind the address; connections are the same for all.

        Raises:
            TimeoutError: it takes too long.
            BadAnswer: there is no connection, or too much comes.
        """
        return self._send("post", payload, path)

    def get(self, path: str = "") -> Answered:
        """Return what the address itself says, or a path behind it; raises as `post` does."""
        return self._send("get", None, path)

    def stream(self, payload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the objects of an answer that is sent as it is written; the iteration's end hangs up.

        Raises:
            TimeoutError: it takes too long.
            NeverAnswered: the endpoint says that it never answers this request, such as one that is too long.
            BadAnswer: there is no connection, or the endpoint refuses, or its answer breaks off.
        """
        import httpx
        import openai

        try:
            opened: openai.Stream[Any] = self._opened().post(
                f"/{self._path}", body=dict(payload) | {"stream": True}, cast_to=object, stream=True,
                stream_cls=openai.Stream[Any], options={"headers": self._headers()})
            with opened:
                for part in opened:
                    if isinstance(part, Mapping):
                        yield part
        except openai.APIStatusError as e:
            body = e.response.content
            said = reason_of(body, self._secret) or f"HTTP {e.status_code}"
            if why := why_never(body):
                raise NeverAnswered(f"the request is {why} ({said})") from None
            raise BadAnswer(f"the endpoint refuses ({said})") from None
        except openai.APIError as e:
            if isinstance(e, openai.APIConnectionError):
                raise self._failure(e) from None
            # an error that comes in place of the next part
            raise BadAnswer(f"the endpoint broke off ({' '.join(str(e.message).split())[:200]})") from None
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._failure(e) from None

    @property
    def _secret(self) -> str:
        return self._key or (os.environ.get(self._key_env, "") if self._key_env else "")

    def _headers(self) -> dict[str, Any]:
        import openai

        # no compression: a limit of bytes would count packed ones, and little unpacks to much
        return {"Accept-Encoding": "identity",
                "Authorization": f"Bearer {self._secret}" if self._secret else openai.Omit()}

    def _send(self, method: str, payload: Mapping[str, Any] | None, path: str) -> Answered:
        import httpx
        import openai

        asked: dict[str, Any] = {"cast_to": httpx.Response, "options": {"headers": self._headers()}}
        if payload is not None:
            asked["body"] = dict(payload)
        try:
            response = getattr(self._opened(), method)(f"/{self._path}{path}", **asked)
        except openai.APIStatusError as e:
            response = e.response
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._failure(e) from None
        return Answered(response.status_code,
                        {name.lower(): value for name, value in response.headers.items()}, response.content)

    def _failure(self, error: Exception) -> Exception:
        """Return what is raised for a request that was not answered."""
        import httpx
        import openai

        if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
            return TimeoutError(f"the endpoint took longer than {self._timeout_s:g} s")
        cause = error.__cause__ or error
        if isinstance(cause, _unbounded()):
            return BadAnswer(str(cause))
        return BadAnswer(f"the connection failed ({type(cause).__name__})", is_away=True)

    def _opened(self) -> Any:
        """Return the client, made once: openai's, over an HTTP client of ours that keeps the limits."""
        import httpx
        import openai

        with self._lock:
            if self._client is None:
                http = httpx.Client(timeout=self._timeout_s,
                                    limits=httpx.Limits(max_connections=None, keepalive_expiry=KEPT_S),
                                    # reading all certificates takes long, and plain HTTP has none
                                    verify=self._is_secure,
                                    # a proxy of the environment knows this machine as itself
                                    trust_env=not self._is_here,
                                    event_hooks={"request": [self._begin],
                                                 "response": [partial(_bound, self._max_bytes)]})
                self._client = openai.OpenAI(base_url=self._base, api_key="none", max_retries=0,
                                             timeout=self._timeout_s, http_client=http)  # type: ignore[arg-type]
            return self._client

    def _begin(self, request: Any) -> None:
        # httpx limits each read alone: an answer that comes byte by byte would pass that limit for ever
        request.extensions["until_s"] = time.monotonic() + self._timeout_s


def _bound(max_bytes: int, response: Any) -> None:
    """Let a response be read up to its limits alone; a packed one might be anything when unpacked."""
    if response.headers.get("content-encoding", "identity") != "identity":
        response.close()
        raise _unbounded()("the endpoint sent a packed answer, which was not asked for",
                           request=response.request)
    response.stream = _bounded_stream(response, max_bytes)


def _unbounded() -> Any:
    import httpx

    return httpx.DecodingError


def _bounded_stream(response: Any, max_bytes: int) -> Any:
    import httpx

    inner, request = response.stream, response.request

    class BoundedStream(httpx.SyncByteStream):
        """A stream that ends with an error at a limit of bytes or time."""

        def __iter__(self) -> Iterator[bytes]:
            size_bytes = 0
            for block in inner:
                size_bytes += len(block)
                if size_bytes > max_bytes:
                    raise _unbounded()(f"the endpoint sent more than {max_bytes >> 20} MiB",
                                       request=request)
                if time.monotonic() > request.extensions["until_s"]:
                    raise httpx.ReadTimeout("the request has taken its time", request=request)
                yield block

        def close(self) -> None:
            inner.close()

    return BoundedStream()
