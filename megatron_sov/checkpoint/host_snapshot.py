"""A copy in host memory of the blocks that a process owns, which threads write to files
while training goes on.

The copy is as large as what it copies.  Its memory is kept from one checkpoint to the next: on a CPU the
pages of fresh memory take several times as long as the copy itself, and on a GPU pinned
memory is slow to get.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.checkpoint.sharded_tensors import MAX_FILE_BYTES, RANKS_PER_FOLDER, Index, TensorWriter
from megatron_sov.engine.model.local_shards import LocalShard
from megatron_sov.engine.parallel.device import Arena, num_bytes, on_gpu

MAX_WRITERS = 4
"""Threads that hash and write, at most."""
WRITERS_PER_CORE = 2
"""Threads for each core of this process's share: a thread waits for the disk about as long as it hashes
and writes."""
MIN_FILE_BYTES = 64 << 20
"""Files are made smaller than `MAX_FILE_BYTES` to give every thread one, but not smaller than this."""
INDICES = "indices"
"""Folder, inside a checkpoint that is being written, of what each process has written;
gone when it is complete."""


@dataclasses.dataclass(frozen=True)
class WrittenSnapshot:
    """What one process wrote of a checkpoint."""

    indices: dict[str, list[Index]]
    """Part -> index of each of its files."""
    files: dict[str, FileRecord]
    """File relative to the checkpoint -> its record."""

    @staticmethod
    def file(folder: Path, rank: int) -> Path:
        return folder / INDICES / f"{rank // RANKS_PER_FOLDER:05d}" / f"rank-{rank:05d}.json"

    @staticmethod
    def read(folder: Path, rank: int) -> WrittenSnapshot:
        raw = json.loads(WrittenSnapshot.file(folder, rank).read_text(encoding="utf-8"))
        return WrittenSnapshot(raw["indices"],
                               {name: FileRecord.read(record) for name, record in raw["files"].items()})


class Snapshot:
    """What this process owns, as it was when `take` was called."""

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], torch.Tensor] = {}
        self._parts: dict[str, list[LocalShard]] = {}

    def take(self, sources: Mapping[str, Iterable[LocalShard]], *, changes: bool = True) -> None:
        """Copy the owned blocks of each part; the live tensors may change afterwards.

        Args:
            sources: part -> its blocks.
            changes: without it the live tensors stay as they are until `write` has ended, so those in host
                memory are written from where they are.
        """
        owned = {part: [b for b in blocks if b.owned] for part, blocks in sources.items()}
        if not changes and not on_gpu():
            self._memory, self._parts = {}, owned
            return
        wanted = {_identity(part, b): b for part, blocks in owned.items() for b in blocks}
        # memory of the checkpoint before serves again; only blocks that are new, or whose kind has changed,
        # take fresh memory
        missing = {key: b for key, b in wanted.items() if key not in self._memory}
        arena = Arena(sum(num_bytes(b.data) for b in missing.values()))
        self._memory = {key: self._memory[key] if key in self._memory else arena.like(b.data)
                        for key, b in wanted.items()}
        for key, block in wanted.items():
            # on a GPU all copies are on their way before the first is waited for
            self._memory[key].copy_(block.data.detach(), non_blocking=True)
        self._parts = {part: [dataclasses.replace(b, data=self._memory[_identity(part, b)]) for b in blocks]
                       for part, blocks in owned.items()}
        # the next step may overwrite the weights as soon as this returns
        if on_gpu():
            torch.cuda.synchronize()

    def write(self, folder: Path, rank: int) -> None:
        """Write the copy into files of `folder` and, last, what was written,
        for the process that completes the checkpoint.

        Raises:
            OSError: the disk is full or refuses.
        """
        files = [(part, number, blocks) for part, all_blocks in self._parts.items()
                 for number, blocks in enumerate(_per_file(all_blocks))]
        written: list[tuple[str, TensorWriter, Index]] = []

        def write(part: str, number: int, blocks: list[LocalShard]) -> None:
            writer = TensorWriter(folder, part, rank, number)
            for block in blocks:
                writer.add(block.key, block.data, block.global_shape, block.offset)
            written.append((part, writer, writer.finish()))

        run_in_threads([lambda args=file: write(*args) for file in files],  # type: ignore[misc]
                       num_writers())
        result = WrittenSnapshot({part: [i for p, _, i in written if p == part] for part in self._parts},
                                 {name: record for _, writer, _ in written for name,
                                  record in writer.files.items()})
        file = WrittenSnapshot.file(folder, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")  # its name says that it is whole: nobody has to be asked
        # vars and not asdict, which copies every entry of the indices before it is written
        # the index comes last: where it is, all of this rank's files are whole
        unfinished.write_text(json.dumps(vars(result), default=vars))
        os.replace(unfinished, file)


def _identity(part: str, block: LocalShard) -> tuple[Any, ...]:
    return part, block.key, block.offset, tuple(block.data.shape), block.data.dtype


def _per_file(blocks: list[LocalShard]) -> list[list[LocalShard]]:
    """Cut a part's blocks into files: enough for all threads, none too large, none needlessly small."""
    total_bytes = sum(num_bytes(b.data) for b in blocks)
    limit_bytes = min(MAX_FILE_BYTES, max(MIN_FILE_BYTES, -(-total_bytes // num_writers())))
    files: list[list[LocalShard]] = []
    # as if a file were full, so that the first block opens one
    size_bytes = limit_bytes
    for block in blocks:
        if size_bytes + num_bytes(block.data) > limit_bytes:
            files.append([])
            size_bytes = 0
        files[-1].append(block)
        size_bytes += num_bytes(block.data)
    return files


def num_writers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MAX_WRITERS, WRITERS_PER_CORE * share)


def run_in_threads(actions: list[Callable[[], None]], num_threads: int) -> None:
    """Do all actions on threads that do not keep a process from ending; raises the first failure,
    after all have ended."""
    waiting, problems = queue.SimpleQueue[Callable[[], None]](), list[Exception]()
    for action in actions:
        waiting.put(action)

    def work() -> None:
        try:
            # after a failure no new file is begun: the checkpoint is lost anyway
            while not problems:
                waiting.get_nowait()()
        except queue.Empty:
            return
        except Exception as e:
            problems.append(e)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(num_threads, len(actions)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
