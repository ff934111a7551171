"""Files through which the passes of a deduplication step exchange records; each appears whole or not at all.

A bucket file holds records sorted by bucket, after a header: number of buckets, first record of each bucket,
checksum of each bucket. A pass over shards writes a bucket for each task of the next pass; the task reads its
bucket from the files of all shards. Arrays (.npy) end with a seal (`megatron_sov.base.sealed`). Readers
check both before use.

A document number is ``rank << 32 | row``. Ranks order shards by descending priority of their source, then by
their place in the pipeline. Of two equal texts the smaller document number stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
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


def write_buckets(path: Path, records: Records, buckets: NDArray[np.int64], num_buckets: int) -> None:
    """Write `records` to a bucket file.

    Args:
        path: file to create.
        records: sorted by bucket.
        buckets: bucket of each record, in [0, num_buckets), ascending.
        num_buckets: buckets of the file, empty ones included.
    """
    places = np.searchsorted(buckets, np.arange(num_buckets + 1)).astype(_PLACE)
    checksums = np.zeros(num_buckets, _PLACE)
    for bucket in np.unique(buckets).tolist():
        begin, end = places[bucket:bucket + 2].tolist()
        checksums[bucket] = _compute_checksum(path, bucket, begin, records[begin:end])
    with create_file(path, create_parents=True) as temporary, open(temporary, "wb") as f:
        np.array([num_buckets], _PLACE).tofile(f)
        places.tofile(f)
        checksums.tofile(f)
        records.tofile(f)


class BucketWriter:
    """Writes a bucket file one bucket after the other, in ascending order."""

    def __init__(self, path: Path, num_buckets: int) -> None:
        """Create `path`, a temporary name."""
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115  (closed by `close`)
        self._places, self._checksums = np.zeros(num_buckets + 1, _PLACE), np.zeros(num_buckets, _PLACE)
        # Reserve the header: `close` fills its figures after the last bucket.
        np.array([num_buckets], _PLACE).tofile(self._file)
        self._places.tofile(self._file)
        self._checksums.tofile(self._file)

    def append_bucket(self, bucket: int, records: Records) -> None:
        if len(records):
            begin = int(self._places[bucket])
            self._checksums[bucket] = _compute_checksum(self._path, bucket, begin, records)
        # All later buckets begin after `records`, the empty ones too.
        self._places[bucket + 1:] += np.uint64(len(records))
        records.tofile(self._file)

    def close(self) -> None:
        self._file.seek(_PLACE.itemsize)
        self._places.tofile(self._file)
        self._checksums.tofile(self._file)
        self._file.close()


@dataclass(frozen=True)
class Slice:
    """Consecutive records of a bucket file, read on demand."""

    path: Path
    dtype: np.dtype[Any]
    begin_bytes: int
    """Offset of the first record in the file."""
    num_records: int

    def slice_records(self, start: int, stop: int) -> Slice:
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
        """Read the leading 64 bits of the key of record `place`."""
        return int(get_leading_bits(self.read_records(place, place + 1)["key"])[0])

    def find_first_key(self, bound: int, start: int) -> int:
        """Find by binary search the first record from `start` on whose key is at least `bound`."""
        return start + bisect_left(range(start, self.num_records), bound, key=self.read_key)


def open_bucket(path: Path, dtype: np.dtype[Any], bucket: int) -> Slice:
    """Return the records of one bucket of a bucket file after reading them once to verify their checksum.

    Raises:
        UserError: the bucket is damaged.
    """
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

    Compiled loops compile again for read-only arrays, hence the writable map.

    Raises:
        UserError: the file is damaged.
    """
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
    """Concatenate `pieces` into blocks of at least `min_records` records; the last block may be smaller."""
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
    """Return the first 64 bits of keys (uint64, or 8 n bytes) as uint64 [n] in the order of the keys."""
    if keys.dtype == np.uint64:
        return keys
    # Big-endian numbers sort like the bytes of the keys.
    words = np.ascontiguousarray(keys).view(">u8").reshape(-1, keys.dtype.itemsize // 8)
    return words[:, 0].astype(np.uint64)


def compute_key_partitions(keys: NDArray[Any], num_partitions: int) -> NDArray[np.int64]:
    """Return the partition of each key [n]; ascending keys have ascending partitions."""
    # (upper 32 bits) * num_partitions / 2^32: even shares in the order of the keys, without a division.
    upper = get_leading_bits(keys) >> np.uint64(32)
    return (upper * np.uint64(num_partitions) >> np.uint64(32)).astype(np.int64)


class Numbering:
    """Ranks of the shards of a view."""

    def __init__(self, view: View) -> None:
        # `sorted` is stable: shards of equal priority keep the order of the pipeline.
        self.shards = sorted(view.shards, key=lambda shard: -view.get_priority(shard.source))
        """All shards by rank."""
        self.rank_by_shard = {shard: rank for rank, shard in enumerate(self.shards)}


def get_ranks(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (numbers >> ROW_BITS).astype(np.int64)


def get_rows(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (numbers & ROW_MASK).astype(np.int64)


class Register:
    """Row, length and id of every document, in a .npy table for each shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def write(self, rank: int, documents: Sequence[tuple[int, int, str]]) -> None:
        """Write the table of a shard from (row, characters, id) of each document, sorted by row."""
        # Fixed width: readers map the table into memory and read any row.
        ids = [id_.encode() for _, _, id_ in documents]
        width = max(map(len, ids), default=1)
        table = np.empty(len(ids), [("row", "<u4"), ("characters", "<u8"), ("id", f"S{width}")])
        table["row"] = [row for row, _, _ in documents]
        table["characters"] = [characters for _, characters, _ in documents]
        table["id"] = ids
        write_array(self._folder / f"{rank:06}.npy", table)

    def read(self, rank: int) -> NDArray[Any]:
        """Return the table of a shard with the fields `row`, `characters`, `id`."""
        if rank not in self._tables:
            self._tables[rank] = read_array(self._folder / f"{rank:06}.npy")
            if len(self._tables) > _OPEN_FILES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(rank)
        return self._tables[rank]

    def find_rows(self, rank: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        table = self.read(rank)
        entries: NDArray[Any] = table[np.searchsorted(table["row"], rows)]
        return entries

    def get_document_id(self, number: int) -> str:
        raw: bytes = self.find_rows(number >> 32, np.array([number & 0xFFFFFFFF]))["id"][0]
        return raw.decode()


def register_documents(view: View, shard: ShardRef, rank: int) -> Iterator[list[Doc]]:
    """Yield the documents of a shard in batches; after the last batch write the shard's table."""
    entries: list[tuple[int, int, str]] = []
    for batch in view.iter_documents(shard):
        entries += [(document.row, len(document.text), document.id) for document in batch]
        yield batch
    # After the loop only: a consumer that stops early leaves no table.
    Register(view.work_folder / "documents").write(rank, entries)
