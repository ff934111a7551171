"""Cutting long text into documents at blank lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def cut_at_blank_lines(blocks: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Cut a stream of UTF-8 bytes into pieces of at most `limit_bytes`; joined, the pieces give the stream.

    A cut stands behind the last blank line that fits, else behind the last line, else the last space, else
    between characters.
    """
    buffer = b""
    for block in blocks:
        buffer += block
        start = 0
        while len(buffer) - start > limit_bytes:
            end = cut_position(buffer, start, limit_bytes)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def cut_position(buffer: bytes, start: int, limit_bytes: int) -> int:
    """Return where to cut `buffer` behind `start`, at most `limit_bytes` further."""
    stop = start + limit_bytes
    for separator in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = buffer.rfind(separator, start, stop)
        if found >= 0:
            return found + len(separator)
    end = stop
    while end > start + 1 and buffer[end] & 0xC0 == 0x80:  # a continuation byte: the character began earlier
        end -= 1
    return end


def cut_text(text: str, limit_bytes: int) -> Iterator[str]:
    """Cut one text as `cut_at_blank_lines` does."""
    for piece in cut_at_blank_lines([text.encode()], limit_bytes):
        yield piece.decode()
