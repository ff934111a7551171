"""A time by which a request is over, whatever its connection does.

A client's own limit is of each read and each write: an endpoint that sends its headers byte by byte, or says
again and again that it is still at work, passes it for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

_PIECE_BYTES = 1 << 16
"""Between two looks at the clock while a request is sent."""


class Deadline(threading.local):
    """Of the request that this thread is at."""

    at_s = float("inf")
    """By the monotonic clock."""

    def left_s(self, limit_s: float | None) -> float:
        """Return the seconds that a step may take, 0 or less for none; `limit_s`: its own limit."""
        left_s = self.at_s - time.monotonic()
        return left_s if limit_s is None else min(limit_s, left_s)


def bound_streams(client: Any, deadline: Deadline) -> None:
    """Hold what an `httpx.Client` reads and writes to a deadline; before its first request."""
    # httpx gives no other way to its connections; `test_endpoint.py` sees whether it still does
    for transport in filter(None, (client._transport, *client._mounts.values())):
        pool = transport._pool
        pool._network_backend = _bounded_backend(pool._network_backend, deadline)


def _bounded_backend(inner: Any, deadline: Deadline) -> Any:
    import httpcore

    class Stream(httpcore.NetworkStream):
        """A connection."""

        def __init__(self, stream: httpcore.NetworkStream) -> None:
            self._inner = stream

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self._inner.read(max_bytes, _left(deadline, timeout, httpcore.ReadTimeout))

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            for start in range(0, len(buffer), _PIECE_BYTES):
                left_s = _left(deadline, timeout, httpcore.WriteTimeout)
                self._inner.write(buffer[start:start + _PIECE_BYTES], left_s)

        def close(self) -> None:
            self._inner.close()

        def start_tls(self, ssl_context: Any, server_hostname: str | None = None,
                      timeout: float | None = None) -> httpcore.NetworkStream:
            left_s = _left(deadline, timeout, httpcore.ConnectTimeout)
            return Stream(self._inner.start_tls(ssl_context, server_hostname, left_s))

        def get_extra_info(self, info: str) -> Any:
            return self._inner.get_extra_info(info)

    class Backend(httpcore.NetworkBackend):
        """Makes them."""

        def connect_tcp(self, host: str, port: int, timeout: float | None = None,
                        local_address: str | None = None,
                        socket_options: Iterable[Any] | None = None) -> httpcore.NetworkStream:
            left_s = _left(deadline, timeout, httpcore.ConnectTimeout)
            return Stream(inner.connect_tcp(host, port, left_s, local_address, socket_options))

    return Backend()


def _left(deadline: Deadline, limit_s: float | None, error: type[Exception]) -> float:
    left_s = deadline.left_s(limit_s)
    if left_s <= 0:
        raise error("the request has taken its time")
    return left_s
