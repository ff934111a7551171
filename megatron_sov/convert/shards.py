"""Writes safetensors files tensor by tensor, several files at a time, so that memory holds one tensor of each and not the files.

The library's own writer takes all tensors of a file at once.  The format is short: the header's length as 8 bytes
little-endian, a JSON header with dtype, shape and byte range of each tensor, then the bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sov.artifacts import FileRecord, fsync_path

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT_BYTES = 8
_CHUNK_BYTES = 16 << 20
"""Bytes that are hashed while the same ones are written: few enough to stay in the processor's cache."""


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


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, into files of at most `max_shard_bytes` (a larger tensor gets a file of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if shards[-1] and filled_bytes + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += spec.size_bytes
    return shards


def write_files(folder: Path, files: dict[str, list[TensorSpec]], read: Reader, workers: int,
                finish: Callable[[str, FileRecord], None]) -> None:
    """Write the planned files, `workers` at a time; which of them is written when changes no byte.

    Args:
        folder: where to write.
        files: name -> tensors, e.g. of `plan_shards`.
        read: gives each tensor.
        workers: threads; reading, hashing and writing all leave the interpreter free.
        finish: called for each file when it is on disk, with hash and size.

    Raises:
        UserError: the first that `read` raised; files that have not begun are not written then.
    """
    def write(name: str, hasher: ThreadPoolExecutor) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        finish(name, write_file(path, files[name], read, hasher))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a file's thread is busy by itself
    pool, hasher = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(write, name, hasher) for name in files]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        hasher.shutdown()
        torch.set_num_threads(threads)


def write_file(path: Path, specs: list[TensorSpec], read: Reader, hasher: ThreadPoolExecutor) -> FileRecord:
    """Write and sync one file; `hasher` takes the hash beside, so that bytes are read once. Returns hash and size."""
    # wider dtypes first, so that every tensor starts at a multiple of its item size
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    head = _header(ordered)
    digest, hashing = hashlib.sha256(head), Future[None]()
    hashing.set_result(None)
    with open(path, "wb", buffering=0) as f:
        _write(f.fileno(), memoryview(head))
        for spec in ordered:
            tensor = read(spec)
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: got {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}")
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), _CHUNK_BYTES):
                chunk = raw[start:start + _CHUNK_BYTES]
                hashing.result()
                hashing = hasher.submit(digest.update, chunk)
                _write(f.fileno(), chunk)
        hashing.result()
        size_bytes = f.tell()
    fsync_path(path)
    return FileRecord(digest.hexdigest(), size_bytes)


def _header(specs: list[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.size_bytes
        header[spec.name] = {"dtype": SAFETENSORS_DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    if len(header) != len(specs) + 1:
        raise ValueError(f"{next(n for n in header if [s.name for s in specs].count(n) > 1)}: would stand in one file twice")
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT_BYTES)
    return len(head).to_bytes(8, "little") + head


def _write(fd: int, raw: memoryview) -> None:
    while raw:
        raw = raw[os.write(fd, raw):]
