"""HTTP requests through the `openai` client, limited in time and size; the client is imported on first use.

The API key is read from the environment for each request and appears in its header only.
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

from megatron_sov.base.errors import format_install_command
from megatron_sov.base.settings import ProblemCode, SettingsProblem
from megatron_sov.work.endpoints.answers import (
    BadAnswer, RequestRefused, find_permanent_refusal, read_error_text)

MAX_BODY_BYTES = 8 << 20
KEEPALIVE_S = 2.0
"""Keep-alive time of idle connections: uvicorn servers (vLLM, SGLang) close after 5 s, and a request sent at
that moment fails."""


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def find_address_problems(field: str, text: str, key_field: str) -> list[SettingsProblem]:
    """Return the problems of an address up to `/v1`; the messages never quote the address (possible keys).

    Args:
        field: name of the setting.
        text: its value.
        key_field: name of the setting for the key's environment variable.
    """
    rules = []
    try:
        parts = urlsplit(text)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unclosed brackets, invalid port
        # provide empty parts for the checks below
        parts, is_sound = urlsplit(""), False
    if not is_sound:
        rules.append("must be an address such as http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        rules.append("must end before /chat/completions, which is added to it, such as "
                     "http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        rules.append("holds a key or a query, which would come into files; put the key into the "
                     f"environment and name its variable with {key_field}")
    return [SettingsProblem(ProblemCode.RULE, field, rule) for rule in rules]


@dataclass(frozen=True)
class HttpResponse:
    """HTTP response."""

    status: int
    headers: Mapping[str, str]
    """Header names in lower case."""
    body: bytes


def find_missing_libraries() -> list[str]:
    """Return a sentence per missing library (`openai`, `httpx`)."""
    return [f"{name} is not installed; {format_install_command('judge')}" for name in ("openai", "httpx")
            if importlib.util.find_spec(name) is None]


class Transport:
    """Sends JSON requests to an address, from any thread.

    Args:
        url: the address.
        key_env: environment variable with the API key; unset sends no key.
        timeout_s: limit of a request.
        key: API key for a private server; overrides `key_env`.
        max_bytes: maximum response size; 0: `MAX_BODY_BYTES`.
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

    def post(self, payload: Mapping[str, Any], path: str = "") -> HttpResponse:
        """Send a POST request; return the response with any status.

        Args:
            payload: JSON body.
            path: appended to the address; connections are shared.

        Raises:
            TimeoutError: timeout.
            BadAnswer: no connection, or the response is too large.
        """
        return self._send_request("post", payload, path)

    def get(self, path: str = "") -> HttpResponse:
        """Send a GET request to the address or a path; raises like `post`."""
        return self._send_request("get", None, path)

    def stream(self, payload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the objects of a streamed answer; closing the iterator closes the connection.

        Raises:
            TimeoutError: timeout.
            RequestRefused: the endpoint refuses the request permanently, for example as too long.
            BadAnswer: no connection, a refusal, or an interrupted answer.
        """
        import httpx
        import openai

        try:
            opened: openai.Stream[Any] = self._get_client().post(
                f"/{self._path}", body=dict(payload) | {"stream": True}, cast_to=object, stream=True,
                stream_cls=openai.Stream[Any], options={"headers": self._build_headers()})
            with opened:
                for part in opened:
                    if isinstance(part, Mapping):
                        yield part
        except openai.APIStatusError as e:
            body = e.response.content
            message = read_error_text(body, self._secret) or f"HTTP {e.status_code}"
            if why := find_permanent_refusal(body):
                raise RequestRefused(f"the request is {why} ({message})") from None
            raise BadAnswer(f"the endpoint refuses ({message})") from None
        except openai.APIError as e:
            if isinstance(e, openai.APIConnectionError):
                raise self._convert_error(e) from None
            # an error in place of the next part
            raise BadAnswer(f"the endpoint broke off ({' '.join(str(e.message).split())[:200]})") from None
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._convert_error(e) from None

    @property
    def _secret(self) -> str:
        return self._key or (os.environ.get(self._key_env, "") if self._key_env else "")

    def _build_headers(self) -> dict[str, Any]:
        import openai

        # no compression: limits count compressed bytes, and little can expand to much
        return {"Accept-Encoding": "identity",
                "Authorization": f"Bearer {self._secret}" if self._secret else openai.Omit()}

    def _send_request(self, method: str, payload: Mapping[str, Any] | None, path: str) -> HttpResponse:
        import httpx
        import openai

        arguments: dict[str, Any] = {"cast_to": httpx.Response, "options": {"headers": self._build_headers()}}
        if payload is not None:
            arguments["body"] = dict(payload)
        try:
            response = getattr(self._get_client(), method)(f"/{self._path}{path}", **arguments)
        except openai.APIStatusError as e:
            response = e.response
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._convert_error(e) from None
        return HttpResponse(response.status_code,
                        {name.lower(): value for name, value in response.headers.items()}, response.content)

    def _convert_error(self, error: Exception) -> Exception:
        """Convert a client exception to `TimeoutError` or `BadAnswer`."""
        import httpx
        import openai

        if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
            return TimeoutError(f"the endpoint took longer than {self._timeout_s:g} s")
        cause = error.__cause__ or error
        if isinstance(cause, _decoding_error_class()):
            return BadAnswer(str(cause))
        return BadAnswer(f"the connection failed ({type(cause).__name__})", is_unavailable=True)

    def _get_client(self) -> Any:
        """Return the `openai.OpenAI` client, created on first use over an `httpx.Client` with our limits."""
        import httpx
        import openai

        with self._lock:
            if self._client is None:
                http = httpx.Client(timeout=self._timeout_s,
                                    limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
                                    # loading certificates is slow, and plain HTTP needs none
                                    verify=self._is_secure,
                                    # a proxy would resolve localhost as its own machine
                                    trust_env=not self._is_here,
                                    event_hooks={"request": [self._set_deadline],
                                                 "response": [partial(_limit_response, self._max_bytes)]})
                self._client = openai.OpenAI(base_url=self._base, api_key="none", max_retries=0,
                                             timeout=self._timeout_s,
                                             http_client=http)  # type: ignore[arg-type]
            return self._client

    def _set_deadline(self, request: Any) -> None:
        # httpx limits single reads: an answer arriving byte by byte would never time out
        request.extensions["until_s"] = time.monotonic() + self._timeout_s


def _limit_response(max_bytes: int, response: Any) -> None:
    """Limit a response to `max_bytes` and refuse compressed responses (zip bombs)."""
    if response.headers.get("content-encoding", "identity") != "identity":
        response.close()
        raise _decoding_error_class()("the endpoint sent a packed answer, which was not asked for",
                                      request=response.request)
    response.stream = _limit_stream(response, max_bytes)


def _decoding_error_class() -> Any:
    import httpx

    return httpx.DecodingError


def _limit_stream(response: Any, max_bytes: int) -> Any:
    import httpx

    inner, request = response.stream, response.request

    class BoundedStream(httpx.SyncByteStream):
        """Response stream with limits of size and time."""

        def __iter__(self) -> Iterator[bytes]:
            size_bytes = 0
            for block in inner:
                size_bytes += len(block)
                if size_bytes > max_bytes:
                    raise _decoding_error_class()(f"the endpoint sent more than {max_bytes >> 20} MiB",
                                                  request=request)
                if time.monotonic() > request.extensions["until_s"]:
                    raise httpx.ReadTimeout("the request has taken its time", request=request)
                yield block

        def close(self) -> None:
            inner.close()

    return BoundedStream()
