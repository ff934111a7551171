"""A tensor as `torch.save` wrote it into a part of a file: a zip archive with a pickled header and the bytes.

The header is read as data, and the bytes from where they stand, so that memory holds what was asked for.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.convert.torch_dist import allowed
from megatron_sov.convert.torch_dist.inert import Held, Made, Name, read
from megatron_sov.mcore.checkpoint.safetensors_file import fill_from

MAX_HEADER_BYTES = 1 << 16
MAX_MEMBERS = 64
MAX_READ_BYTES = 1 << 20
"""Of an archive's list of members and its header, at a time."""
_LOCAL_HEADER_BYTES = 30
"""Of a member, before its name and what follows it (APPNOTE.TXT of PKWARE, 4.3.7)."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes stand."""

    path: Path
    start: int
    """First byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, block: Sequence[slice]) -> torch.Tensor:
        """Return the block that slices (start and stop, one for each axis) cut out; OSError where the file
        cannot be read."""
        out = torch.empty([s.stop - s.start for s in block], dtype=self.dtype)
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fill_from(fd, self.start, self.shape, list(block), out)
        finally:
            os.close(fd)
        return out


def find_tensor(path: Path, start: int, length_bytes: int) -> StoredTensor:
    """Return where the one tensor of an archive stands that is a part of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such archive, or its header does not fit its bytes.
    """
    try:
        with open(path, "rb") as file:
            if start + length_bytes > os.fstat(file.fileno()).st_size:
                raise ValueError("the file ends before it does")
            with zipfile.ZipFile(_Window(file, start, length_bytes)) as archive:
                return _found(path, file, start, archive, length_bytes)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as e:
        raise ValueError(f"it is no archive of torch.save ({e})") from None


def _found(path: Path, file: Any, start: int, archive: zipfile.ZipFile, length_bytes: int) -> StoredTensor:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS or any(
            m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 or not 0 <= m.file_size <= length_bytes
            for m in members):
        raise ValueError("its archive is compressed, or has more members than a tensor has")
    of_name = {m.filename.partition("/")[2]: m for m in members}
    header = of_name.get("data.pkl")
    if header is None or header.file_size > MAX_HEADER_BYTES:
        raise ValueError("its archive has no header, or a larger one than a tensor has")
    order = of_name.get("byteorder")
    if order is not None and order.file_size < MAX_HEADER_BYTES and archive.read(order) != b"little":
        raise ValueError("its bytes are in big-endian order")
    dtype, key, num_elements, first, shape = _header(archive.read(header))
    held = of_name.get(f"data/{key}")
    if held is None or held.file_size != num_elements * dtype.itemsize:
        raise ValueError(f"its archive does not hold the {num_elements} numbers that the header says")
    file.seek(start + held.header_offset)
    local = file.read(_LOCAL_HEADER_BYTES)
    if local[:4] != b"PK\3\4":
        raise ValueError("a member of its archive does not begin where it should")
    begin = (start + held.header_offset + _LOCAL_HEADER_BYTES + int.from_bytes(local[26:28], "little")
             + int.from_bytes(local[28:30], "little"))
    if first + math.prod(shape) > num_elements or begin + held.file_size > start + length_bytes:
        raise ValueError("it reaches beyond its bytes")
    return StoredTensor(path, begin + first * dtype.itemsize, shape, dtype)


def _header(raw: bytes) -> tuple[torch.dtype, str, int, int, tuple[int, ...]]:
    """Return dtype, the storage's name and number of elements, the tensor's first element in it, and its
    shape."""
    made = read(raw, allowed.in_tensor)
    if not (isinstance(made, Made) and made.name == allowed.REBUILT and len(made.arguments) >= 4):
        raise ValueError("its header describes no tensor")
    held, first, shape, strides = made.arguments[:4]
    stored = held.key if isinstance(held, Held) else ()
    if not (isinstance(stored, tuple) and len(stored) == 5 and stored[0] == "storage"
            and isinstance(stored[1], Name) and stored[1] in allowed.STORAGES and isinstance(stored[2], str)):
        raise ValueError("its header names no storage of numbers")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
            and all(type(n) is int and n >= 0 for n in (stored[4], first, *shape, *strides))):
        raise ValueError("its header has no sizes")
    expected = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    if any(n > 1 and stride != whole for n, stride, whole in zip(shape, strides, expected, strict=True)):
        raise ValueError(f"it does not stand row by row (strides {list(strides)[:8]})")
    return getattr(torch, allowed.STORAGES[stored[1]]), stored[2], stored[4], first, shape


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, start: int, length_bytes: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length_bytes, 0

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def seekable(self) -> bool:
        """Return that it is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the part."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read as `RawIOBase`; ValueError for more than what an archive of one tensor has at a place."""
        if min(size if size >= 0 else self._length, self._length - self._at) > MAX_READ_BYTES:
            raise ValueError(f"its archive has a list of more than {MAX_READ_BYTES:,} bytes")
        return super().read(min(size, MAX_READ_BYTES)) or b""

    def readinto(self, buffer: Any) -> int:
        """Read what fits, up to the part's end."""
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        raw = self._file.read(count)
        buffer[:len(raw)] = raw
        self._at += len(raw)
        return len(raw)
