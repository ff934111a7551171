"""Length-prefixed JSON messages over a socket between a process and its child."""

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


def send_message(channel: socket.socket, message: Any) -> None:
    """Send a message; raises OSError if the other process has ended."""
    # surrogatepass: file names may contain bytes outside UTF-8
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    channel.sendall(_LENGTH.pack(len(data)) + data)


def receive_message(channel: socket.socket, most_bytes: int | None = None) -> Any:
    """Receive the next message.

    Args:
        channel: the socket.
        most_bytes: maximum message size; None if the sender is trusted.

    Raises:
        EOFError: the sender has ended.
        OSError: the sender has ended, or the socket timed out.
        ValueError: the message is too long or not JSON.
    """
    (length,) = _LENGTH.unpack(_read_bytes(channel, _LENGTH.size))
    if most_bytes is not None and length > most_bytes:
        raise ValueError(f"a message of {length} bytes, of at most {most_bytes}")
    return json.loads(_read_bytes(channel, length))


def _read_bytes(channel: socket.socket, num_bytes: int) -> bytes:
    parts = []
    while num_bytes:
        # Read in parts, so that a forged length allocates no memory.
        part = channel.recv(min(num_bytes, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)
