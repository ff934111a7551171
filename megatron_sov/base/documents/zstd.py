"""Reading `.zst` files of one or more frames, and noticing when one is cut off (the library's
own reader does not)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_INPUT_BYTES = 1 << 10
"""Compressed bytes taken at a time: small, since four of them can stand for a block of 128 KiB."""


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a file; wrap it in `io.BufferedReader`."""

    def __init__(self, file: Path) -> None:
        self._file = open(file, "rb")  # noqa: SIM115  (closed in close)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer`; returns the bytes written, 0 at the end.

        Raises:
            EOFError: the file ends inside a frame, or its data are damaged.
        """
        while not self._pending:
            if self._frame.eof:
                # the next frame begins inside the block that ended the last one
                raw = self._frame.unused_data or self._file.read(_INPUT_BYTES)
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                raw = self._file.read(_INPUT_BYTES)
            if not raw:
                # no more bytes: the end of the file if no frame is open, else a file that was cut off
                if self._begun:
                    raise EOFError("the compressed data end inside a frame")
                return 0
            self._begun = True
            try:
                self._pending = memoryview(self._frame.decompress(raw))
            except zstandard.ZstdError as e:
                raise EOFError(str(e)) from None
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._pending))
        target[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
