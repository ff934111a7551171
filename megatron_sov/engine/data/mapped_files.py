"""Files of a token shard by memory maps: Megatron-Core's index, and flat files of numbers beside it."""

from __future__ import annotations

import contextlib
import mmap
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sov.base.errors import UserError

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
                                           6: np.float64, 7: np.float32, 8: np.uint16}
"""Dtype codes of the `.idx` header, as in megatron.core.datasets.indexed_dataset."""
_HEADER_BYTES = len(IDX_MAGIC) + 8 + 1 + 8 + 8


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says."""

    dtype: np.dtype
    """Of token ids."""
    lengths: np.ndarray
    """[documents] int32: their tokens."""
    pointers: np.ndarray
    """[documents] int64: the byte of `.bin` at which each begins."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        if not len(self.lengths):
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])


def read_index(file: Path) -> Index:
    """Open an index.

    Raises:
        UserError: it is none.
        IndexError, KeyError, ValueError: it is damaged.
    """
    content = mapped(file)
    if content[:9] != IDX_MAGIC:
        raise UserError(f"{file}: is not a Megatron index (its first bytes are {content[:9]!r}); "
                        "pack the data again")
    count = int(np.frombuffer(content, np.uint64, 1, offset=18)[0])
    return Index(np.dtype(IDX_DTYPES[content[17]]),
                 np.frombuffer(content, np.int32, count, offset=_HEADER_BYTES),
                 np.frombuffer(content, np.int64, count, offset=_HEADER_BYTES + 4 * count))


def numbers(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Return the numbers of a flat file.

    Raises:
        UserError: they are not `count`.
    """
    size_bytes, expected_bytes = file.stat().st_size, count * dtype.itemsize
    if size_bytes != expected_bytes:  # a slice beyond the end would silently be short
        raise UserError(f"{file}: has {size_bytes} bytes, the index asks for {expected_bytes}; "
                        "pack the data again")
    return np.frombuffer(mapped(file), dtype)


def mapped(file: Path) -> mmap.mmap | bytes:
    """Return a file's bytes by a memory map."""
    with open(file, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""


def allow_open_files() -> None:
    """Raise this process's limit on open files as far as it may: a mapped file keeps its
    descriptor (CPython's mmap)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
