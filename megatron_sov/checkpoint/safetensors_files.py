"""Read and write safetensors files tensor by tensor.

The format: the header length as 8 bytes little-endian, a JSON header with dtype, shape and byte range of each
tensor, then the bytes without gaps (https://github.com/huggingface/safetensors#format). The safetensors
library is not used, because it maps whole files, so every page read counts as memory of the process, and
because it writes all tensors of a file at once. Here memory holds one or two tensors, and files are hashed
while they are written.
"""

import ctypes
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""Dtype name in the file -> dtype. Reading a tensor with a further dtype raises `UserError`."""
SAFETENSORS_DTYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 64
"""Maximum axes of a tensor, as in torch."""
_COVER_BYTES = 32 << 20
"""Maximum bytes per read if only some columns are needed: whole rows are read and then cut."""
_READ_BYTES = 1 << 30
"""Maximum bytes per `preadv`; Linux reads at most 2^31 - 4096."""
_ALIGNMENT_BYTES = 8
_CHUNK_BYTES = 1 << 20
"""Bytes hashed and written at a time: few enough to stay in the CPU cache between the two steps."""
_WRITE_BYTES = 256 << 10
"""Limit of bytes per `write`: Linux is up to five times slower, as it searches for contiguous memory."""
_WRITE_BACK_BYTES = 8 << 20
"""Bytes after which write-back to disk starts; otherwise Linux keeps the bytes in memory until `fsync`, and
disk and CPU work in turn."""
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
"""Linux system call without a Python wrapper."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's header entry."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """File offset of the first byte."""
    size_bytes: int


class TensorFile:
    """A safetensors file opened for reading; methods are thread-safe.

    Args:
        path: the file.
        remedy: advice that ends every error message about damage, e.g. "download it again".

    Raises:
        UserError: the file is missing, truncated or malformed; the message names the first affected tensor.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path, self._remedy = path, remedy
        try:
            self.entries = _read_header(path)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            raise self._build_error(e) from None

    def _build_error(self, why: object) -> UserError:
        return UserError(f"{self.path}: cannot be read as a safetensors file ({why}); {self._remedy}")

    def get_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor `name`; raises `UserError` for a dtype outside `DTYPES`."""
        stored_dtype = self.entries[name].dtype
        if stored_dtype not in DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {stored_dtype}, but only {', '.join(DTYPES)} can "
                            "be read; save the model without quantization")
        return DTYPES[stored_dtype]

    def read(self, name: str, block: Sequence[slice] | None = None,
             dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read tensor `name`, whole or a block.

        Args:
            name: key in the file.
            block: slices with start and stop, one per axis; None reads the whole tensor.
            dtype: interprets the bytes of a tensor whose stored dtype is not in `DTYPES`.

        Raises:
            UserError: the file lacks the tensor or cannot be read.
        """
        if name not in self.entries:
            raise self._build_error(f"it lacks {name}")
        entry, dtype = self.entries[name], dtype or self.get_dtype(name)
        cut = list(block) if block is not None else [slice(0, n) for n in entry.shape]
        try:
            return read_block(self.path, entry.start, entry.shape, cut, dtype)
        except OSError as e:
            raise UserError(f"{self.path}: {name} cannot be read ({e}); {self._remedy}") from None


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check the header; raises ValueError, KeyError, TypeError, OverflowError or RecursionError."""
    with open(path, "rb") as f:
        size_bytes = os.fstat(f.fileno()).st_size
        beginning = f.read(8)
        if beginning == b"version ":
            raise ValueError("it is a pointer of Git LFS; run `git lfs pull` in its folder")
        length = int.from_bytes(beginning, "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(f"its header would have {length} of the file's {size_bytes} bytes")
        header = json.loads(f.read(length), object_pairs_hook=_build_unique_dict)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = end = 8 + length
    entries = {}
    # In byte order, each tensor must start where the previous tensor ends: no overlaps, no hidden bytes.
    for name, raw in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        entry = _parse_entry(name, raw, data_start)
        if entry.start != end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end += entry.size_bytes
        if end > size_bytes:
            raise ValueError(f"{name} is cut off: the file ends {end - size_bytes} bytes too early for it")
        entries[name] = entry
    if end != size_bytes:
        raise ValueError(f"{size_bytes - end} bytes follow the last tensor")
    return entries


def _parse_entry(name: str, raw: dict[str, Any], data_start: int) -> TensorEntry:
    """Check and convert a header entry; `data_start` is the file offset of the tensor data."""
    start, stop = raw["data_offsets"]
    shape = tuple(raw["shape"])
    if odd := [n for n in (start, stop, *shape) if type(n) is not int]:
        raise ValueError(f"{name} has {odd[0]!r} in its shape and offsets, which is not an integer")
    if len(shape) > MAX_AXES:  # the product of a hostile header's numbers would take hours
        raise ValueError(f"{name} has {len(shape)} axes, more than {MAX_AXES}")
    size_bytes = stop - start
    dtype = DTYPES.get(raw["dtype"])
    if (min(shape, default=0) < 0 or size_bytes < 0
            or (dtype and math.prod(shape) * dtype.itemsize != size_bytes)):
        raise ValueError(f"{name} has {size_bytes} bytes, which is not {raw['dtype']} {list(shape)}")
    return TensorEntry(str(raw["dtype"]), shape, data_start + start, size_bytes)


def _build_unique_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        [(duplicate, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{duplicate} is in its header twice")
    return values


def read_block(path: Path, start: int, shape: Sequence[int], block: Sequence[slice],
               dtype: torch.dtype) -> torch.Tensor:
    """Open `path` and return a block of a tensor; arguments and errors as in `read_block_into`."""
    out = torch.empty([s.stop - s.start for s in block], dtype=dtype)
    fd = os.open(path, os.O_RDONLY)
    try:
        read_block_into(fd, start, shape, block, out)
    finally:
        os.close(fd)
    return out


def read_block_into(fd: int, start: int, shape: Sequence[int], block: Sequence[slice],
                    out: torch.Tensor) -> None:
    """Read a tensor block from a file into `out`.

    Args:
        fd: file descriptor.
        start: offset of the tensor's first byte; the tensor is stored in row-major order.
        shape: shape of the whole tensor.
        block: slices with start and stop, one per axis.
        out: contiguous tensor with the block's shape.

    Raises:
        OSError: the file cannot be read or is too short.
    """
    row_bytes = math.prod(shape[1:]) * out.element_size()
    # a block of whole rows is contiguous in the file
    if all(s.start == 0 and s.stop == n for s, n in zip(block[1:], shape[1:], strict=True)):
        _read_bytes(fd, start + (block[0].start * row_bytes if block else 0), out)
        return
    if row_bytes > _COVER_BYTES:  # large rows, such as stacked experts: read each block separately
        for i in range(block[0].stop - block[0].start):
            read_block_into(fd, start + (block[0].start + i) * row_bytes, shape[1:], block[1:], out[i])
        return
    step = max(1, _COVER_BYTES // max(1, row_bytes))
    for low in range(block[0].start, block[0].stop, step):
        high = min(low + step, block[0].stop)
        cover = torch.empty([high - low, *shape[1:]], dtype=out.dtype)
        _read_bytes(fd, start + low * row_bytes, cover)
        out[low - block[0].start:high - block[0].start] = cover[(slice(None), *block[1:])]


def _read_bytes(fd: int, start: int, out: torch.Tensor) -> None:
    if not out.numel():
        return
    raw = out.view(-1).view(torch.uint8).numpy().data
    while raw:
        count = os.preadv(fd, [raw[:_READ_BYTES]], start)
        if count == 0:
            raise OSError("the file has become shorter")
        raw, start = raw[count:], start + count


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype for writing a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


TensorSource = Callable[[TensorSpec], torch.Tensor]
"""Returns the tensor for a spec; called once per tensor, in file order, possibly from several threads."""


def write_tensors(path: Path, specs: list[TensorSpec], read: TensorSource,
                  reader: Executor | None = None) -> FileRecord:
    """Write and sync a safetensors file; return digest and size.

    Args:
        path: file to write.
        specs: tensors of the file; written in the order of decreasing item size.
        read: returns a tensor.
        reader: if given, reads the next tensor while the current tensor is hashed and written.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: a tensor differs from its spec in shape or dtype, or two specs have the same name.
    """
    # wider dtypes first: each tensor starts at a multiple of its item size
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    next_tensor: Future[torch.Tensor] | None = None
    with open(path, "wb", buffering=0) as f:
        file = _HashedFile(f.fileno())
        file.append_bytes(memoryview(_format_header(ordered)))
        for number, spec in enumerate(ordered, 1):
            tensor = read(spec) if next_tensor is None else next_tensor.result()
            # Read the next tensor while this tensor is hashed and written: two tensors in memory.
            if reader is not None and number < len(ordered):
                next_tensor = reader.submit(read, ordered[number])
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: got {tensor.dtype} {tuple(tensor.shape)}, "
                                 f"planned {spec.dtype} {spec.shape}")
            file.append_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor  # free the tensor before a third tensor is read
        os.fsync(f.fileno())
    return FileRecord(file.digest.text(), file.size_bytes)


class _HashedFile:
    """An open file whose written bytes are hashed and passed to the disk."""

    def __init__(self, fd: int) -> None:
        self.digest, self.size_bytes = Digest(), 0
        self._fd, self._write_back_bytes = fd, 0

    def append_bytes(self, raw: memoryview) -> None:
        """Hash and write bytes, and start write-back after `_WRITE_BACK_BYTES`."""
        for start in range(0, len(raw), _CHUNK_BYTES):
            chunk = raw[start:start + _CHUNK_BYTES]
            self.digest.update(chunk)
            _write_bytes(self._fd, chunk)
            self.size_bytes += len(chunk)
            if (waiting_bytes := self.size_bytes - self._write_back_bytes) >= _WRITE_BACK_BYTES:
                _start_write_back(self._fd, self._write_back_bytes, waiting_bytes)
                self._write_back_bytes = self.size_bytes


def _format_header(specs: list[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.size_bytes
        header[spec.name] = {"dtype": SAFETENSORS_DTYPES[spec.dtype], "shape": spec.shape,
                             "data_offsets": [start, end]}
    if len(header) != len(specs) + 1:
        names = [spec.name for spec in specs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{duplicate}: would be in one file twice")
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT_BYTES)
    return len(head).to_bytes(8, "little") + head


def _write_bytes(fd: int, raw: memoryview) -> None:
    while raw:
        raw = raw[os.write(fd, raw[:_WRITE_BYTES]):]


def _start_write_back(fd: int, start: int, size_bytes: int) -> None:
    """Start write-back for a file range without waiting; disk errors surface in `fsync`."""
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, ctypes.c_int64(start), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)
