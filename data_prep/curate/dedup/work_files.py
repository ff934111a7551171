"""Files with records that deduplication passes exchange; an incomplete file never gets its final name.

A bucket file holds records sorted by bucket, after a header: the number of buckets, and for every bucket its
first record and checksum. A pass over shards writes a bucket for each task in the next pass, and the task
reads its bucket from every shard's file. Arrays (.npy) end with a seal (`megatron_sov.base.sealed`). Readers
verify checksums and seals.

A document number is ``rank << 32 | row``. Ranks order shards by descending source priority, then as in the
pipeline. If two texts are equal, the smaller document number stays.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.pipeline.step import Doc, ShardRef, View
from data_prep.damaged_files import explain_deletion, get_place_in_run
from megatron_sov.base.artifacts import create_file
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import check_seal, seal_file

Records = NDArray[Any]
"""Structured array [num_records]."""
ROW_BITS = np.uint64(32)
ROW_MASK = np.uint64((1 << 32) - 1)
_PLACE = np.dtype("<u8")
_BLOCK_BYTES = 1 << 20
_OPEN_FILES = 64


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
            checksums[bucket] = _compute_checksum(path, bucket, num_records, records)
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


@dataclass(frozen=True)
class Slice:
    """Consecutive records in a bucket file, read on demand."""

    path: Path
    dtype: np.dtype[Any]
    begin_bytes: int
    """Offset of the first record in the file."""
    num_records: int

    def slice_records(self, start: int, stop: int) -> "Slice":
        return Slice(self.path, self.dtype, self.begin_bytes + start * self.dtype.itemsize, stop - start)

    def read_records(self, start: int = 0, stop: int | None = None) -> Records:
        count = (self.num_records if stop is None else stop) - start
        if not count:
            return np.empty(0, self.dtype)
        with open(self.path, "rb") as f:
            f.seek(self.begin_bytes + start * self.dtype.itemsize)
            records: Records = np.fromfile(f, self.dtype, count)
        assert len(records) == count, f"{self.path}: is cut off"
        return records

    def read_key(self, place: int) -> int:
        """Read the leading 64 bits of record `place`'s key."""
        return int(get_leading_bits(self.read_records(place, place + 1)["key"])[0])

    def find_first_key(self, bound: int, start: int) -> int:
        """Find the first record from `start` on with a key of at least `bound`, by binary search."""
        return start + bisect_left(range(start, self.num_records), bound, key=self.read_key)


def iter_key_ranges(slices: Sequence[Slice], low: int, high: int, max_records: int) -> Iterator[list[Slice]]:
    """Cut sorted slices at common keys into ranges with about `max_records` records.

    Hashes spread evenly, so equal ranges of keys hold about equally many records.

    Args:
        slices: slices with leading 64 bits of keys in [low, high).
        low: lower bound.
        high: upper bound.
        max_records: records to hold in memory.
    """
    num_ranges = max(1, -(-sum(part.num_records for part in slices) // max_records))
    starts = [0] * len(slices)
    for number in range(1, num_ranges + 1):
        bound = low + (high - low) * number // num_ranges
        stops = [part.find_first_key(bound, start) for part, start in zip(slices, starts, strict=True)]
        if number == num_ranges:
            stops = [part.num_records for part in slices]
        yield [part.slice_records(start, stop)
               for part, start, stop in zip(slices, starts, stops, strict=True) if stop > start]
        starts = stops


def open_bucket(path: Path, dtype: np.dtype[Any], bucket: int) -> Slice:
    """Return a bucket's records after a first reading that verifies the checksum. Raises `UserError`: the
    bucket is damaged."""
    def read_number(f: Any, place: int) -> int:
        # A damaged header may name any place: clamp the offset to the file's end.
        f.seek(min(place * _PLACE.itemsize, size_bytes))
        return int.from_bytes(f.read(_PLACE.itemsize), "little")

    size_bytes = path.stat().st_size
    with open(path, "rb") as f:
        count = read_number(f, 0)
        begin, end = read_number(f, 1 + bucket), read_number(f, 2 + bucket)
        checksum = read_number(f, 2 + count + bucket)
        records = Slice(path, dtype, (2 + 2 * count) * _PLACE.itemsize + begin * dtype.itemsize, end - begin)
        if begin == end:
            # `write_buckets` stores 0 for an empty bucket.
            is_sound = checksum == 0
        else:
            digest = _start_digest(path, bucket, begin, end)
            missing_bytes = (end - begin) * dtype.itemsize
            f.seek(min(records.begin_bytes, size_bytes))
            while missing_bytes > 0 and (block := f.read(min(missing_bytes, _BLOCK_BYTES))):
                digest.update(block)
                missing_bytes -= len(block)
            is_sound = missing_bytes == 0 and _shorten_digest(digest) == checksum
    if not is_sound:
        raise UserError(f"{path}: is damaged (part {bucket} differs from its own checksum); "
                        f"{explain_deletion(path)}")
    return records


def _compute_checksum(path: Path, bucket: int, begin: int, records: Records) -> int:
    digest = _start_digest(path, bucket, begin, begin + len(records))
    digest.update(np.ascontiguousarray(records).view(np.uint8).data)
    return _shorten_digest(digest)


def _start_digest(path: Path, *place: int) -> Digest:
    digest = Digest()
    # The digest includes file and place, so a sound bucket of another file or place is still rejected.
    digest.update(" ".join([get_place_in_run(path), *map(str, place), ""]).encode())
    return digest


def _shorten_digest(digest: Digest) -> int:
    return int(digest.text().partition(":")[2][:16], 16)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a sealed .npy file and rename it to `path` once it is on the disk."""
    with create_file(path, create_parents=True) as temporary:
        save_array(temporary, array)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a sealed .npy file; `path` is a temporary name."""
    with open(path, "wb") as f:
        np.save(f, array, allow_pickle=False)
    seal_file(path, get_place_in_run(path))


def read_array(path: Path) -> NDArray[Any]:
    """Map a sealed .npy file into memory, copy on write.

    Compiled loops compile again for read-only arrays, hence the writable map. Raises `UserError`: the file is
    damaged."""
    check_seal(path, explain_deletion(path), get_place_in_run(path))
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        array = np.load(path, allow_pickle=False)
    return np.asarray(array)


def list_part_files(folder: Path) -> list[Path]:
    """List the files in the subfolders of `folder`, sorted, without hidden subfolders of killed tasks."""
    return [file for part in sorted(folder.iterdir()) if not part.name.startswith(".")
            for file in sorted(part.iterdir())]


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


def get_leading_bits(keys: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the first 64 bits of keys (uint64, or a multiple of 8 bytes) as uint64 [num_keys]."""
    if keys.dtype == np.uint64:
        return keys
    # Big-endian numbers sort like the bytes of the keys.
    words = np.ascontiguousarray(keys).view(">u8").reshape(-1, keys.dtype.itemsize // 8)
    return words[:, 0].astype(np.uint64)


def compute_key_partitions(keys: NDArray[Any], num_partitions: int) -> NDArray[np.int64]:
    """Return the partition for each key [n]; ascending keys have ascending partitions."""
    # (upper 32 bits) * num_partitions / 2^32: even shares in the order of the keys, without a division.
    upper = get_leading_bits(keys) >> np.uint64(32)
    return (upper * np.uint64(num_partitions) >> np.uint64(32)).astype(np.int64)


def compute_partition_bounds(partition: int, num_partitions: int) -> tuple[int, int]:
    """Return the first key in a partition and in the next partition; inverse of `compute_key_partitions`."""
    low, high = (-(-(edge << 32) // num_partitions) << 32 for edge in (partition, partition + 1))
    return low, high


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
