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
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError

# Reads safetensors files block by block with plain reads: memory holds what was asked for, and nothing stays
# mapped.
#
# The library maps whole files, so that every page that was ever read counts as memory of the process.  The
# format is short (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes
# little-endian, a JSON header with dtype, shape and byte range of each tensor, then the bytes without gaps.
# All of that is checked when a file is opened.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""The format's names of the dtypes that are read here; files may hold others,
which are refused when they are asked for."""
MAX_HEADER_BYTES = 100_000_000
_COVER_BYTES = 32 << 20
"""Bytes that are read at a time where only a part of each row is wanted."""
_READ_BYTES = 1 << 30
"""Bytes of one system call; Linux gives at most 2^31 - 4096."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    size_bytes: int


class TensorFile:
    """The tensors of one safetensors file; reading is safe from several threads at a time."""

    def __init__(self, path: Path, remedy: str) -> None:
        """Read and check the header.

        Args:
            path: the file.
            remedy: how a message about a damaged file ends, e.g. "download it again".

        Raises:
            UserError: the file is missing, cut, or no safetensors file;
                the message names the first tensor that suffers.
        """
        self.path, self._remedy = path, remedy
        try:
            self.entries = _entries(path)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            raise self._damaged(e) from None

    def _damaged(self, why: object) -> UserError:
        return UserError(f"{self.path}: cannot be read as a safetensors file ({why}); {self._remedy}")

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; `UserError` for one that cannot be read."""
        found = self.entries[name].dtype
        if found not in DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {found}, but only {', '.join(DTYPES)} can be "
                            "read; save the model without quantisation")
        return DTYPES[found]

    def read(self, name: str, block: Sequence[slice] | None = None,
             dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor, or the block of it that the slices (start and stop, one for each axis) cut out.

        Args:
            name: of the tensor.
            block: the part of it; None: all.
            dtype: of a tensor whose own is none of `DTYPES`, for a caller who knows what its bytes are.

        Raises:
            UserError: the file lacks the tensor, or cannot be read any more.
        """
        if name not in self.entries:
            raise self._damaged(f"it lacks {name}")
        entry, dtype = self.entries[name], dtype or self.dtype(name)
        cut = list(block) if block is not None else [slice(0, n) for n in entry.shape]
        try:
            return read_block(self.path, entry.start, entry.shape, cut, dtype)
        except OSError as e:
            raise UserError(f"{self.path}: {name} cannot be read ({e}); {self._remedy}") from None


def _entries(path: Path) -> dict[str, TensorEntry]:
    """Return the file's tensors; ValueError, KeyError, TypeError, OverflowError or RecursionError
    where the header is not sound."""
    with open(path, "rb") as f:
        size_bytes = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(f"its header would have {length} of the file's {size_bytes} bytes")
        header = json.loads(f.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    first, end = 8 + length, 0
    entries = {}
    # in the order of their bytes: each tensor must begin where the one before ends, so none overlap and no
    # byte is hidden
    for name, raw in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        entry = _entry(name, raw, first)
        if entry.start != first + end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end += entry.size_bytes
        if first + end > size_bytes:
            raise ValueError(f"{name} is cut off: the file ends {first + end - size_bytes} bytes "
                             "too early for it")
        entries[name] = entry
    if first + end != size_bytes:
        raise ValueError(f"{size_bytes - first - end} bytes follow the last tensor")
    return entries


def _entry(name: str, raw: dict[str, Any], first: int) -> TensorEntry:
    start, stop = raw["data_offsets"]
    shape = tuple(raw["shape"])
    if odd := [n for n in (start, stop, *shape) if type(n) is not int]:
        raise ValueError(f"{name} has {odd[0]!r} among its shape and offsets, which is no whole number")
    size_bytes = stop - start
    known = DTYPES.get(raw["dtype"])
    if (min(shape, default=0) < 0 or size_bytes < 0
            or (known and math.prod(shape) * known.itemsize != size_bytes)):
        raise ValueError(f"{name} has {size_bytes} bytes, which is not {raw['dtype']} {list(shape)}")
    return TensorEntry(str(raw["dtype"]), shape, first + start, size_bytes)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in "
                         "its header twice")
    return found


def read_block(path: Path, start: int, shape: Sequence[int], block: Sequence[slice], dtype: torch.dtype
               ) -> torch.Tensor:
    """Return a block of a tensor in a file; arguments and errors as of `fill_from`."""
    out = torch.empty([s.stop - s.start for s in block], dtype=dtype)
    fd = os.open(path, os.O_RDONLY)
    try:
        fill_from(fd, start, shape, block, out)
    finally:
        os.close(fd)
    return out


def fill_from(fd: int, start: int, shape: Sequence[int], block: Sequence[slice], out: torch.Tensor) -> None:
    """Read a block of a tensor in a file into the contiguous `out`.

    Args:
        fd: the file.
        start: byte at which the tensor, row by row, begins.
        shape: of the whole tensor.
        block: start and stop along each axis.
        out: of the block's shape.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    if all(s.start == 0 and s.stop == n for s, n in zip(block[1:], shape[1:], strict=True)):
        row_bytes = math.prod(shape[1:]) * out.element_size()
        _read(fd, start + (block[0].start * row_bytes if block else 0), out)
        return
    row_bytes = math.prod(shape[1:]) * out.element_size()
    if row_bytes > _COVER_BYTES:  # a row is large, as an expert in a stack is: cut out of each by itself
        for i in range(block[0].stop - block[0].start):
            fill_from(fd, start + (block[0].start + i) * row_bytes, shape[1:], block[1:], out[i])
        return
    step = max(1, _COVER_BYTES // max(1, row_bytes))
    for low in range(block[0].start, block[0].stop, step):
        high = min(low + step, block[0].stop)
        cover = torch.empty([high - low, *shape[1:]], dtype=out.dtype)
        _read(fd, start + low * row_bytes, cover)
        out[low - block[0].start:high - block[0].start] = cover[(slice(None), *block[1:])]


def _read(fd: int, start: int, out: torch.Tensor) -> None:
    if not out.numel():
        return
    raw = out.view(-1).view(torch.uint8).numpy().data
    while raw:
        count = os.preadv(fd, [raw[:_READ_BYTES]], start)
        if count == 0:
            raise OSError("the file has become shorter")
        raw, start = raw[count:], start + count


SAFETENSORS_DTYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
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
            # the next tensor is read while this one is hashed and written: two are in memory, and no more
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
        names = [spec.name for spec in specs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: would stand in one file twice")
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
