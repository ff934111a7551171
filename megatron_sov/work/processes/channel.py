"""Messages between a process and its child: JSON behind its length, over a socket."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(channel: socket.socket, message: Any) -> None:
    """Send a message; raises OSError where the other side has gone."""
    # surrogatepass: names of files may hold bytes that are no UTF-8
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    channel.sendall(_LENGTH.pack(len(data)) + data)


def receive(channel: socket.socket, most_bytes: int | None = None) -> Any:
    """Return the next message.

    Args:
        channel: where it comes from.
        most_bytes: that it may have; None: the other side is trusted.

    Raises:
        EOFError: the other side has gone.
        OSError: likewise, or a time limit of the socket has passed.
        ValueError: it is longer, or no JSON.
    """
    (length,) = _LENGTH.unpack(_read(channel, _LENGTH.size))
    if most_bytes is not None and length > most_bytes:
        raise ValueError(f"a message of {length} bytes, of at most {most_bytes}")
    return json.loads(_read(channel, length))


def _read(channel: socket.socket, num_bytes: int) -> bytes:
    parts = []
    while num_bytes:
        # a length that the other side made up reserves no memory: parts come as they are sent
        part = channel.recv(min(num_bytes, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)
