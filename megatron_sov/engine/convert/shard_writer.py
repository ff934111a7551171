"""Writes safetensors files, several at a time, so that memory holds two tensors of each and not the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.engine.mcore.checkpoint.writer import Reader, TensorSpec, write_file


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, into files of at most `max_shard_bytes` (a larger tensor gets
    a file of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if shards[-1] and filled_bytes + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += spec.size_bytes
    return shards


def digest_of(files: Mapping[str, list[TensorSpec]]) -> str:
    """Return a hash of which file holds which tensors: what an unfinished conversion is known again by."""
    names = json.dumps([[file, [spec.name for spec in specs]] for file, specs in files.items()])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def write_files(folder: Path, files: dict[str, list[TensorSpec]], read: Reader, workers: int,
                finish: Callable[[str, FileRecord], None]) -> None:
    """Write the planned files, `workers` at a time; which of them is written when changes no byte.

    Args:
        folder: where to write.
        files: name -> tensors, e.g. of `plan_shards`.
        read: gives each tensor.
        workers: files at a time, each with a thread that reads, and one that hashes and writes; all leave the
            interpreter free.
        finish: called for each file when it is on disk, with hash and size.

    Raises:
        UserError: the first that `read` raised; files that have not begun are not written then.
    """
    def write(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as reader:
            record = write_file(path, files[name], read, reader)
        finish(name, record)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a file's thread is busy by itself
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(write, name) for name in files]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
