"""Copy a process's blocks to host memory, and write the copies to files while training continues.

The copy is as large as the blocks. Its memory is reused for the next checkpoint, because page faults of new
CPU memory take several times as long as the copy, and pinned memory for GPUs is slow to allocate.
"""

import dataclasses
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.checkpoint.sharded_tensors import MAX_FILE_BYTES, RANKS_PER_FOLDER, Index, TensorWriter
from megatron_sov.engine.model.local_shards import LocalShard
from megatron_sov.engine.parallel.device import PinnedArena, count_bytes, on_gpu

MAX_WRITERS = 4
"""Maximum number of threads that hash and write."""
WRITERS_PER_CORE = 2
"""Threads per CPU core: a thread waits for the disk about half the time."""
MIN_FILE_BYTES = 64 << 20
"""Minimum file size where files are made smaller than `MAX_FILE_BYTES` to give each thread a file."""
INDICES = "indices"
"""Folder for `SnapshotRecord` files inside an incomplete checkpoint, deleted on completion."""


@dataclasses.dataclass(frozen=True)
class SnapshotRecord:
    """Indices and files that a process wrote for a checkpoint."""

    indices: dict[str, list[Index]]
    """Part -> an `Index` per file."""
    files: dict[str, FileRecord]
    """Path relative to the checkpoint -> record."""

    @staticmethod
    def file(folder: Path, rank: int) -> Path:
        return folder / INDICES / f"{rank // RANKS_PER_FOLDER:05d}" / f"rank-{rank:05d}.json"

    @staticmethod
    def read(folder: Path, rank: int) -> "SnapshotRecord":
        raw = json.loads(SnapshotRecord.file(folder, rank).read_text(encoding="utf-8"))
        return SnapshotRecord(raw["indices"],
                              {name: FileRecord.read(record) for name, record in raw["files"].items()})


class HostSnapshot:
    """Host copy of this process's blocks."""

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], torch.Tensor] = {}
        self._parts: dict[str, list[LocalShard]] = {}

    def copy_blocks(self, sources: Mapping[str, Iterable[LocalShard]], *,
                    tensors_change: bool = True) -> None:
        """Copy the owned blocks; afterwards the live tensors may change.

        Args:
            sources: part -> blocks.
            tensors_change: False promises that live tensors do not change until `write` has returned. Tensors
                in host memory are then written without a copy.
        """
        owned = {part: [b for b in blocks if b.owned] for part, blocks in sources.items()}
        if not tensors_change and not on_gpu():
            self._memory, self._parts = {}, owned
            return
        blocks_by_id = {_identify_block(part, b): b for part, blocks in owned.items() for b in blocks}
        # Reuse the memory of the previous checkpoint; allocate only for blocks that are new or changed dtype.
        missing = {key: b for key, b in blocks_by_id.items() if key not in self._memory}
        arena = PinnedArena(sum(count_bytes(b.data) for b in missing.values()))
        reused = {key: memory for key, memory in self._memory.items() if key in blocks_by_id}
        self._memory = reused | {key: arena.allocate_like(b.data) for key, b in missing.items()}
        for key, block in blocks_by_id.items():
            # on a GPU, the copies are queued before the synchronize below
            self._memory[key].copy_(block.data.detach(), non_blocking=True)
        self._parts = {}
        for part, blocks in owned.items():
            self._parts[part] = [dataclasses.replace(b, data=self._memory[_identify_block(part, b)])
                                 for b in blocks]
        # after this method, the next training step may overwrite the weights
        if on_gpu():
            torch.cuda.synchronize()

    def write(self, folder: Path, rank: int) -> None:
        """Write the copy to files in `folder`, then a `SnapshotRecord` for the rank that completes the
        checkpoint. Raises `OSError`: the disk is full or not writable."""
        files = [(part, number, blocks) for part, part_blocks in self._parts.items()
                 for number, blocks in enumerate(_split_into_files(part_blocks))]
        written: list[tuple[str, TensorWriter, Index]] = []

        def write_blocks(part: str, number: int, blocks: list[LocalShard]) -> None:
            writer = TensorWriter(folder, part, rank, number)
            for block in blocks:
                writer.add(block.key, block.data, block.global_shape, block.offset)
            written.append((part, writer, writer.finish()))

        run_in_threads([partial(write_blocks, *file) for file in files], count_writers())
        indices: dict[str, list[Index]] = {part: [] for part in self._parts}
        for part, _, index in written:
            indices[part].append(index)
        records = {name: record for _, writer, _ in written for name, record in writer.files.items()}
        file = SnapshotRecord.file(folder, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        # written last and renamed atomically: the record proves that the rank's files are complete
        unfinished = file.with_suffix(".part")
        # `vars`, because `asdict` would copy every index entry
        unfinished.write_text(json.dumps(vars(SnapshotRecord(indices, records)), default=vars))
        os.replace(unfinished, file)


def _identify_block(part: str, block: LocalShard) -> tuple[Any, ...]:
    return part, block.key, block.offset, tuple(block.data.shape), block.data.dtype


def _split_into_files(blocks: list[LocalShard]) -> list[list[LocalShard]]:
    """Group blocks into files of `MIN_FILE_BYTES` to `MAX_FILE_BYTES`, if possible a file per thread."""
    total_bytes = sum(count_bytes(b.data) for b in blocks)
    limit_bytes = min(MAX_FILE_BYTES, max(MIN_FILE_BYTES, -(-total_bytes // count_writers())))
    files: list[list[LocalShard]] = []
    size_bytes = limit_bytes  # the first block opens a file
    for block in blocks:
        if size_bytes + count_bytes(block.data) > limit_bytes:
            files.append([])
            size_bytes = 0
        files[-1].append(block)
        size_bytes += count_bytes(block.data)
    return files


def count_writers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MAX_WRITERS, WRITERS_PER_CORE * share)


def run_in_threads(actions: list[Callable[[], None]], num_threads: int) -> None:
    """Run `actions` on daemon threads, then raise the first error."""
    pending, errors = queue.SimpleQueue[Callable[[], None]](), list[Exception]()
    for action in actions:
        pending.put(action)

    def run_actions() -> None:
        try:
            # after an error the checkpoint is lost: start no further file
            while not errors:
                pending.get_nowait()()
        except queue.Empty:
            return
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run_actions, daemon=True)
               for _ in range(min(num_threads, len(actions)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
