"""Writes a safetensors file tensor by tensor, hashed on the way, so that memory holds one
tensor, or two, and not the file.

The library's own writer takes all tensors of a file at once.  The format is short: the header's length as 8
bytes little-endian, a JSON header with dtype, shape and byte range of each tensor, then the bytes without
gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sov.artifacts import FileRecord
from megatron_sov.digests import Digest
from megatron_sov.mcore.checkpoint.safetensors_file import DTYPES

SAFETENSORS_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT_BYTES = 8
_CHUNK_BYTES = 1 << 20
"""Bytes that are hashed and then written: few enough to stay in the processor's cache between the two."""
_WRITE_BYTES = 256 << 10
"""Bytes of one system call: for larger ones Linux looks for larger runs of free memory, which costs up to
five times the time."""
_WRITE_BACK_BYTES = 8 << 20
"""Bytes after which the disk is set to work: else Linux keeps them in memory until the sync at the end, and
disk and processor wait for each other."""
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
"""Linux alone has it, and Python has no name for it."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Return how many bytes the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize


Reader = Callable[[TensorSpec], torch.Tensor]
"""Returns the tensor of a spec; called once for each, in the order of its file, by several threads."""


def write_file(path: Path, specs: list[TensorSpec], read: Reader,
               reader: Executor | None = None) -> FileRecord:
    """Write and sync one file, and return its digest and size; the disk works beside the writing, and
    `reader`, where given, reads the next tensor beside it.

    Raises:
        OSError: the disk is full or refuses.
    """
    # wider dtypes first, so that every tensor starts at a multiple of its item size
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    ahead: Future[torch.Tensor] | None = None
    with open(path, "wb", buffering=0) as f:
        file = _HashedFile(f.fileno())
        file.append(memoryview(_header(ordered)))
        for number, spec in enumerate(ordered, 1):
            tensor = read(spec) if ahead is None else ahead.result()
            if reader is not None and number < len(ordered):
                ahead = reader.submit(read, ordered[number])
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: got {tensor.dtype} {tuple(tensor.shape)}, "
                                 f"planned {spec.dtype} {spec.shape}")
            file.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor  # else it would be the third in memory while the next but one is read
        os.fsync(f.fileno())
    return FileRecord(file.digest.text(), file.size_bytes)


class _HashedFile:
    """A file in the making: its bytes so far, hashed and on their way to the disk."""

    def __init__(self, fd: int) -> None:
        self.digest, self.size_bytes = Digest(), 0
        self._fd, self._begun_bytes = fd, 0

    def append(self, raw: memoryview) -> None:
        """Hash and write the next bytes, and set the disk to work on what has come together."""
        for start in range(0, len(raw), _CHUNK_BYTES):
            chunk = raw[start:start + _CHUNK_BYTES]
            self.digest.update(chunk)
            _write(self._fd, chunk)
            self.size_bytes += len(chunk)
            if (waiting_bytes := self.size_bytes - self._begun_bytes) >= _WRITE_BACK_BYTES:
                _start_write_back(self._fd, self._begun_bytes, waiting_bytes)
                self._begun_bytes = self.size_bytes


def _header(specs: list[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.size_bytes
        header[spec.name] = {"dtype": SAFETENSORS_DTYPES[spec.dtype], "shape": spec.shape,
                             "data_offsets": [start, end]}
    if len(header) != len(specs) + 1:
        raise ValueError(f"{next(n for n in header if [s.name for s in specs].count(n) > 1)}: "
                         "would stand in one file twice")
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT_BYTES)
    return len(head).to_bytes(8, "little") + head


def _write(fd: int, raw: memoryview) -> None:
    while raw:
        raw = raw[os.write(fd, raw[:_WRITE_BYTES]):]


def _start_write_back(fd: int, start: int, size_bytes: int) -> None:
    """Have the disk take a range of a file, and do not wait for it; what goes wrong comes up in the sync."""
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, ctypes.c_int64(start), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)
