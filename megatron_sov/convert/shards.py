"""Writes safetensors files tensor by tensor, so that memory holds one tensor and not one file.

The library's own writer takes all tensors of a file at once.  The format is short: the header's length as 8 bytes
little-endian, a JSON header with dtype, shape and byte range of each tensor, then the bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sov.artifacts import FileRecord, atomic_write, to_json
from megatron_sov.convert.sources import INDEX, SINGLE_FILE

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT_BYTES = 8


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


def write_shards(folder: Path, shards: list[list[TensorSpec]],
                 read: Callable[[TensorSpec], torch.Tensor]) -> dict[str, FileRecord]:
    """Write the planned files, and the index that transformers needs where there are several.

    Args:
        folder: where to write.
        shards: from `plan_shards`.
        read: returns the tensor of a spec; called once for each, in the order of the file.

    Returns:
        Hash and size of each safetensors file, taken while writing.
    """
    if len(shards) == 1:
        return {SINGLE_FILE: _write_file(folder / SINGLE_FILE, shards[0], read)}
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    records = {file: _write_file(folder / file, shard, read) for file, shard in zip(files, shards, strict=True)}
    total_bytes = sum(spec.size_bytes for shard in shards for spec in shard)
    weight_map = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_write(folder / INDEX, to_json(index))
    return records


def _write_file(path: Path, specs: list[TensorSpec], read: Callable[[TensorSpec], torch.Tensor]) -> FileRecord:
    # wider dtypes first, so that every tensor starts at a multiple of its item size
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        start, end = end, end + spec.size_bytes
        header[spec.name] = {"dtype": SAFETENSORS_DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT_BYTES)
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            f.write(part)
        for spec in ordered:
            tensor = read(spec)
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: got {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}")
            raw = tensor.contiguous().view(torch.uint8).numpy().data
            digest.update(raw)
            f.write(raw)
        size_bytes = f.tell()
    return FileRecord(digest.hexdigest(), size_bytes)
