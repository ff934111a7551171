"""Reads safetensors files block by block with plain reads: memory holds what was asked for,
and nothing stays mapped.

The library maps whole files, so that every page that was ever read counts as memory of the process.  The
format is short (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes
little-endian, a JSON header with dtype, shape and byte range of each tensor, then the bytes without gaps.
All of that is checked when a file is opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.errors import UserError

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
        out = torch.empty([s.stop - s.start for s in cut], dtype=dtype)
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                fill_from(fd, entry.start, entry.shape, cut, out)
            finally:
                os.close(fd)
        except OSError as e:
            raise UserError(f"{self.path}: {name} cannot be read ({e}); {self._remedy}") from None
        return out


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
