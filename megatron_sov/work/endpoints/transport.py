"""HTTP requests with JSON bodies, limited in time and size; the client is imported with the first request."""

import importlib.util
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_sov.base.errors import format_install_command
from megatron_sov.base.settings import ProblemCode, SettingsProblem

if TYPE_CHECKING:
    import httpx

    from megatron_sov.work.endpoints.http_client import HttpClient

MAX_BODY_BYTES = 8 << 20
KEEPALIVE_S = 2.0
"""Keep-alive time of idle connections: uvicorn servers (vLLM, SGLang) close after 5 s, and a request sent at
that moment fails."""


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def find_address_problems(field: str, text: str, key_field: str) -> list[SettingsProblem]:
    """Return the problems of an address up to `/v1`; messages never quote the address, which may hold a key.

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

    def __init__(self, url: str, key_env: str, timeout_s: float, key: str = "", max_bytes: int = 0) -> None:
        self._url, self._key_env, self._timeout_s, self._key = url, key_env, timeout_s, key
        self._max_bytes = max_bytes or MAX_BODY_BYTES
        self._lock = threading.Lock()
        self._client: HttpClient | None = None

    def post(self, payload: Mapping[str, Any], path: str = "") -> "httpx.Response":
        """Send a POST request; return the response with any status.

        Args:
            payload: JSON body.
            path: appended to the address; connections are shared.

        Raises:
            TimeoutError: timeout.
            BadAnswer: no connection, or the response is too large.
        """
        return self._open_client().send_request("post", payload, path)

    def get(self, path: str = "") -> "httpx.Response":
        """Send a GET request to the address or a path; raises like `post`."""
        return self._open_client().send_request("get", None, path)

    def stream(self, payload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the objects of a streamed answer; closing the iterator closes the connection.

        Raises:
            TimeoutError: timeout.
            RequestRefused: the endpoint refuses the request permanently, for example as too long.
            BadAnswer: no connection, a refusal, or an interrupted answer.
        """
        yield from self._open_client().stream(payload)

    def _open_client(self) -> "HttpClient":
        """Return the client, created on first use."""
        # not at the top: `openai` takes a second to import
        from megatron_sov.work.endpoints.http_client import HttpClient

        with self._lock:
            if self._client is None:
                self._client = HttpClient(self._url, self._key_env, self._timeout_s, self._key,
                                          self._max_bytes, KEEPALIVE_S)
            return self._client
