"""Files with records that deduplication passes exchange; an incomplete file never gets its final name.

A bucket file holds records sorted by bucket, after a header: the number of buckets, and for every bucket its
first record and checksum. A pass over shards writes a bucket for each task in the next pass, and the task
reads its bucket from every shard's file. Arrays (.npy) end with a seal (`megatron_sov.base.sealed`). Readers
verify checksums and seals.

A document number is ``rank << 32 | row``. Ranks order shards by descending source priority, then as in the
pipeline. If two texts are equal, the smaller document number stays.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from data_prep.curate.pipeline.step import Doc, ShardRef, View
from data_prep.damaged_files import explain_deletion, read_array, write_array
from megatron_sov.base.artifacts import create_file
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_memory

Records = NDArray[Any]
"""Structured array [num_records]."""
ROW_BITS = np.uint64(32)
ROW_MASK = np.uint64((1 << 32) - 1)
_PLACE = np.dtype("<u8")
_OPEN_FILES = 64
SORT_COPIES = 4
"""Memory for sorting a partition, in multiples of its size."""


@contextmanager
def create_bucket_file(path: Path, num_buckets: int) -> Iterator[Callable[[int, Records], None]]:
    """Create a bucket file; yields a function that appends non-empty buckets, in ascending order."""
    counts, checksums = np.zeros(num_buckets + 1, _PLACE), np.zeros(num_buckets, _PLACE)
    num_records = 0
    with create_file(path, create_parents=True) as temporary, open(temporary, "wb") as f:
        # Space for the header, which is known after the last bucket.
        f.seek(counts.nbytes + checksums.nbytes + _PLACE.itemsize)

        def append_bucket(bucket: int, records: Records) -> None:
            nonlocal num_records
            checksums[bucket] = _compute_checksum(bucket, num_records, records)
            counts[bucket + 1] = len(records)
            num_records += len(records)
            records.tofile(f)

        yield append_bucket
        f.seek(0)
        np.concatenate([np.array([num_buckets], _PLACE), np.cumsum(counts), checksums]).tofile(f)


def write_buckets(path: Path, records: Records, buckets: NDArray[np.int64], num_buckets: int) -> None:
    """Write `records` to a bucket file.

    Args:
        path: file to create.
        records: sorted by bucket.
        buckets: bucket for each record, in [0, num_buckets), ascending.
        num_buckets: number of buckets, including empty buckets.
    """
    with create_bucket_file(path, num_buckets) as append_bucket:
        numbers, begins = np.unique(buckets, return_index=True)
        ends = np.append(begins, len(records))[1:]
        for bucket, begin, end in zip(numbers.tolist(), begins, ends, strict=True):
            append_bucket(bucket, records[begin:end])


def read_bucket(path: Path, dtype: np.dtype[Any], bucket: int) -> Records:
    """Read a bucket's records and verify the checksum. Raises `UserError`: the bucket is damaged."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as f:
        def read_bytes(begin_bytes: int, num_bytes: int) -> bytes:
            # A damaged header may name any place and number: clamp both to the file's size.
            f.seek(min(begin_bytes, size_bytes))
            return f.read(max(0, min(num_bytes, size_bytes)))

        def read_number(place: int) -> int:
            return int.from_bytes(read_bytes(place * _PLACE.itemsize, _PLACE.itemsize), "little")

        count = read_number(0)
        begin, end = read_number(1 + bucket), read_number(2 + bucket)
        checksum = read_number(2 + count + bucket)
        raw = read_bytes((2 + 2 * count) * _PLACE.itemsize + begin * dtype.itemsize,
                         (end - begin) * dtype.itemsize)
    # `write_buckets` stores 0 for an empty bucket.
    expected = 0 if begin == end else _compute_checksum(bucket, begin, np.frombuffer(raw, np.uint8))
    if len(raw) != (end - begin) * dtype.itemsize or checksum != expected:
        raise UserError(f"{path}: is damaged (part {bucket} differs from its own checksum); "
                        f"{explain_deletion(path)}")
    return np.frombuffer(raw, dtype)


def read_partition(files: Sequence[Path], dtype: np.dtype[Any], partition: int, num_partitions: int
                   ) -> Records:
    """Read a partition's records from the shards' files. Raises `UserError`: sorting them needs more than
    half of the available memory."""
    needs_bytes = SORT_COPIES * sum(file.stat().st_size for file in files) // num_partitions
    usable_bytes = psutil.virtual_memory().available // 2
    if needs_bytes > usable_bytes:
        enough = 1 << math.ceil(math.log2(num_partitions * needs_bytes / max(1, usable_bytes)))
        raise UserError(f"{files[0].parent}: a partition takes {format_memory(needs_bytes)} to sort, and a "
                        f"task may take {format_memory(usable_bytes)} of this machine; set `partitions: "
                        f"{enough}` in the step, or run it on a machine with more memory")
    return np.concatenate([read_bucket(file, dtype, partition) for file in files])


def _compute_checksum(bucket: int, begin: int, records: Records) -> int:
    digest = Digest()
    # The digest includes the place, so a sound bucket of another place is rejected.
    digest.update(f"{bucket} {begin} ".encode())
    digest.update(np.ascontiguousarray(records).view(np.uint8).data)
    return int(digest.text().partition(":")[2][:16], 16)


def list_part_files(folder: Path) -> list[Path]:
    """List the files in `folder`, sorted, without hidden files of killed tasks."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def join_blocks(pieces: Iterable[Records], min_records: int) -> Iterator[Records]:
    """Concatenate `pieces` into blocks with at least `min_records` records; the last block may be smaller."""
    waiting: list[Records] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count >= min_records:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if count:
        yield np.concatenate(waiting)


def compute_key_partitions(keys: NDArray[Any], num_partitions: int) -> NDArray[np.int64]:
    """Return the partition for each key [n] (uint64, or a multiple of 8 bytes)."""
    # Big-endian numbers sort like the bytes of the keys.
    words = np.ascontiguousarray(keys).view("<u8" if keys.dtype == np.uint64 else ">u8")
    leading = words.reshape(-1, keys.dtype.itemsize // 8)[:, 0].astype(np.uint64)
    # (upper 32 bits) * num_partitions / 2^32: even shares in the order of the keys, without a division.
    return ((leading >> np.uint64(32)) * np.uint64(num_partitions) >> np.uint64(32)).astype(np.int64)


def find_group_begins(keys: NDArray[Any]) -> NDArray[np.int64]:
    """Return for each of the ascending `keys` [n] the index of the first equal key."""
    begins = np.arange(len(keys))
    begins[1:][keys[1:] == keys[:-1]] = 0
    return np.maximum.accumulate(begins)


class Numbering:
    """Ranks for the shards in a view."""

    def __init__(self, view: View) -> None:
        # `sorted` is stable: with equal priority, the pipeline determines the order.
        self.shards = sorted(view.shards, key=lambda shard: -view.get_priority(shard.source))
        """All shards by rank."""
        self.rank_by_shard = {shard: rank for rank, shard in enumerate(self.shards)}


def get_ranks(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (numbers >> ROW_BITS).astype(np.int64)


def get_rows(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (numbers & ROW_MASK).astype(np.int64)


class Register:
    """Rows, lengths and ids for all documents, with a .npy table for each shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def write_table(self, rank: int, documents: Sequence[tuple[int, int, str]]) -> None:
        """Write a shard's table from (row, characters, id) tuples, sorted by row."""
        # Fixed width: readers map the table into memory and read any row.
        ids = [id_.encode() for _, _, id_ in documents]
        width = max(map(len, ids), default=1)
        table = np.empty(len(ids), [("row", "<u4"), ("characters", "<u8"), ("id", f"S{width}")])
        table["row"] = [row for row, _, _ in documents]
        table["characters"] = [characters for _, characters, _ in documents]
        table["id"] = ids
        write_array(self._folder / f"{rank:06}.npy", table)

    def read_table(self, rank: int) -> NDArray[Any]:
        """Return a shard's table with the fields `row`, `characters`, `id`."""
        if rank not in self._tables:
            self._tables[rank] = read_array(self._folder / f"{rank:06}.npy")
            if len(self._tables) > _OPEN_FILES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(rank)
        return self._tables[rank]

    def find_rows(self, rank: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        table = self.read_table(rank)
        entries: NDArray[Any] = table[np.searchsorted(table["row"], rows)]
        return entries

    def get_document_id(self, number: int) -> str:
        raw: bytes = self.find_rows(number >> 32, np.array([number & 0xFFFFFFFF]))["id"][0]
        return raw.decode()


def register_documents(view: View, shard: ShardRef, rank: int) -> Iterator[Doc]:
    """Yield a shard's documents; after the last document write the shard's table."""
    entries: list[tuple[int, int, str]] = []
    for document in view.iter_documents(shard):
        entries.append((document.row, len(document.text), document.id))
        yield document
    # After the loop only: a consumer that stops early leaves no table.
    Register(view.work_folder / "documents").write_table(rank, entries)
