"""Megatron-Core's indexed token format: `PREFIX.bin` holds tokens,
`PREFIX.idx` says where each document lies.

The index is (little endian): magic, version (int64), dtype code (int8), number of sequences and of document
bounds (int64 each), lengths in tokens (int32), starts in bytes (int64), document bounds (int64).  Here one
document is one sequence.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}


class IndexedWriter:
    """Writes one split: tokens and sidecars as they come, the index when closed."""

    def __init__(self, prefix: Path, dtype: str, sidecars: Mapping[str, str] | None = None) -> None:
        """Open `PREFIX.bin` and its sidecars (ending -> dtype, as loss weights and types);
        `dtype` is a key of `DTYPE_CODES`."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.dtype = prefix, dtype
        self.lengths_tokens = array("i")
        names = {"bin": dtype, **(sidecars or {})}
        self._dtypes = {suffix: np.dtype(name).newbyteorder("<") for suffix, name in names.items()}
        self._files = {suffix: open(f"{prefix}.{suffix}", "wb")  # noqa: SIM115  (closed in __exit__)
                       for suffix in names}

    def write(self, lengths_tokens: NDArray[np.int32], columns: dict[str, NDArray[np.generic]]) -> None:
        """Append documents.

        Args:
            lengths_tokens: tokens of each document.
            columns: "bin" (ids) and the sidecars' columns, each a flat array [sum of lengths].
        """
        for suffix, file in self._files.items():
            file.write(np.ascontiguousarray(columns[suffix], dtype=self._dtypes[suffix]).tobytes())
        self.lengths_tokens.frombytes(lengths_tokens.astype(np.int32).tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            write_index(self.prefix, self.dtype, np.frombuffer(self.lengths_tokens, dtype=np.int32)
                        if self.lengths_tokens else np.zeros(0, np.int32))


def write_index(prefix: Path, dtype: str, lengths_tokens: NDArray[np.int32]) -> None:
    """Write `PREFIX.idx` of documents that follow one another in `PREFIX.bin`."""
    starts = np.zeros(len(lengths_tokens), dtype="<i8")
    np.cumsum(lengths_tokens[:-1], out=starts[1:])
    starts *= np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as f:
        f.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], len(lengths_tokens), len(lengths_tokens) + 1))
        f.write(lengths_tokens.astype("<i4").tobytes())
        f.write(starts.tobytes())
        f.write(np.arange(len(lengths_tokens) + 1, dtype="<i8").tobytes())
