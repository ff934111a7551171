"""The `openai` client over `httpx`, limited in time and size.

The API key is read from the environment for each request and appears in its header only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

from megatron_sov.base.errors import stop_check
from megatron_sov.work.endpoints.answers import (
    BadAnswer, RequestRefused, find_permanent_refusal, read_error_text)


class HttpClient:
    """Client for an address; arguments as in `Transport`."""

    def __init__(self, url: str, key_env: str, timeout_s: float, key: str, max_bytes: int,
                 keepalive_s: float) -> None:
        base, _, self._path = url.rpartition("/")
        self._key_env, self._timeout_s, self._key = key_env, timeout_s, key
        is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        http = httpx.Client(timeout=timeout_s,
                            limits=httpx.Limits(max_connections=None, keepalive_expiry=keepalive_s),
                            # loading certificates is slow, and plain HTTP needs none
                            verify=url.startswith("https:"),
                            # a proxy would resolve localhost as its own machine
                            trust_env=not is_local,
                            event_hooks={"request": [self._set_deadline],
                                         "response": [partial(_limit_response, max_bytes)]})
        try:
            self._client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=timeout_s,
                                         http_client=http)  # type: ignore[arg-type]
        except (openai.OpenAIError, httpx.InvalidURL) as e:
            raise self._convert_error(e) from None

    def stream(self, payload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the objects of a streamed answer; raises like `Transport.stream`."""
        stop_check()
        try:
            opened: openai.Stream[Any] = self._client.post(
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
        # no compression: limits count compressed bytes, and little can expand to much
        return {"Accept-Encoding": "identity",
                "Authorization": f"Bearer {self._secret}" if self._secret else openai.Omit()}

    def send_request(self, method: str, payload: Mapping[str, Any] | None, path: str) -> httpx.Response:
        """Send a request to the address with `path` appended, and return the response; raises like
        `Transport.post`."""
        arguments: dict[str, Any] = {"cast_to": httpx.Response, "options": {"headers": self._build_headers()}}
        if payload is not None:
            stop_check()
            arguments["body"] = dict(payload)
        try:
            return getattr(self._client, method)(f"/{self._path}{path}", **arguments)
        except openai.APIStatusError as e:
            return e.response  # type: ignore[return-value]
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._convert_error(e) from None

    def _convert_error(self, error: Exception) -> Exception:
        """Convert a client exception to `TimeoutError` or `BadAnswer`."""
        if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
            return TimeoutError(f"the endpoint took longer than {self._timeout_s:g} s")
        cause = error.__cause__ or error
        if isinstance(cause, httpx.DecodingError):
            return BadAnswer(str(cause))
        return BadAnswer(f"the connection failed ({type(cause).__name__})", is_unavailable=True)

    def _set_deadline(self, request: Any) -> None:
        # httpx limits single reads: an answer arriving byte by byte would never time out
        request.extensions["until_s"] = time.monotonic() + self._timeout_s


def _limit_response(max_bytes: int, response: httpx.Response) -> None:
    """Limit a response to `max_bytes` and refuse compressed responses (zip bombs)."""
    if response.headers.get("content-encoding", "identity") != "identity":
        response.close()
        raise httpx.DecodingError("the endpoint sent a packed answer, which was not asked for",
                                  request=response.request)
    response.stream = _limit_stream(response, max_bytes)


def _limit_stream(response: Any, max_bytes: int) -> Any:
    """Return a response's stream, which raises after `max_bytes` or after the request's deadline."""
    inner, request = response.stream, response.request

    class BoundedStream(httpx.SyncByteStream):
        """Response stream with limits of size and time."""

        def __iter__(self) -> Iterator[bytes]:
            size_bytes = 0
            for block in inner:
                size_bytes += len(block)
                if size_bytes > max_bytes:
                    raise httpx.DecodingError(f"the endpoint sent more than {max_bytes >> 20} MiB",
                                              request=request)
                if time.monotonic() > request.extensions["until_s"]:
                    raise httpx.ReadTimeout("the request has taken its time", request=request)
                yield block

        def close(self) -> None:
            inner.close()

    return BoundedStream()
