"""Files that the passes of one step leave for each other: each appears whole or not at all.

A pass over shards writes for the tasks of the next pass what concerns them, and that task reads its part of
every shard's file: records sorted by bucket, behind the places where the buckets begin and a checksum of each
bucket.  Arrays have a checksum behind them (`sealed`).  Either is looked at before anything is believed.

Documents go by numbers, ``rank << 32 | row``, and the smaller number's text stays.  Shards have ranks by the
priority of their sources, then by their order in the pipeline: a number is smaller where the priority is
higher, or the document comes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
"""Records of some structure [n]."""
_PLACE = np.dtype("<u8")
_BLOCK_BYTES = 1 << 20


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, on the disk behind it."""
    with create_file(path, create_parents=True) as temporary:
        save_array(temporary, array)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy with its checksum; `path`: a temporary name."""
    with open(path, "wb") as f:
        np.save(f, array, allow_pickle=False)
    seal_file(path, get_place_in_run(path))


def read_array(path: Path) -> NDArray[Any]:
    """Return a .npy file's array by memory map, an empty one as it is; what is written to it stays in
    memory (compiled loops take arrays that may be written to for another type than others).

    Raises:
        UserError: it is damaged.
    """
    check_seal(path, explain_deletion(path), get_place_in_run(path))
    try:
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError:  # what is empty cannot be mapped
        found = np.load(path, allow_pickle=False)
    return np.asarray(found)


def list_part_files(folder: Path) -> list[Path]:
    """Return the files in the folders of a folder, in order, without those of a task that was killed."""
    return [file for part in sorted(folder.iterdir()) if not part.name.startswith(".")
            for file in sorted(part.iterdir())]


def write_buckets(path: Path, records: Records, buckets: NDArray[np.int64], num_buckets: int) -> None:
    """Write records that are sorted by bucket.

    Args:
        path: the file.
        records: all, those of a bucket next to each other.
        buckets: of each record, in [0, num_buckets), ascending.
        num_buckets: of the file.
    """
    places = np.searchsorted(buckets, np.arange(num_buckets + 1)).astype(_PLACE)
    digests = np.zeros(num_buckets, _PLACE)
    for bucket in np.unique(buckets).tolist():
        begin, end = places[bucket:bucket + 2].tolist()
        digests[bucket] = _digest(path, bucket, begin, end, records[begin:end])
    with create_file(path, create_parents=True) as temporary, open(temporary, "wb") as f:
        np.array([num_buckets], _PLACE).tofile(f)
        places.tofile(f)
        digests.tofile(f)
        records.tofile(f)


def _digest(path: Path, bucket: int, begin: int, end: int, records: Records) -> int:
    """Return the checksum of a bucket, its place in the file, and the file's in the run."""
    digest = _begun(path, bucket, begin, end)
    if len(records):
        digest.update(np.ascontiguousarray(records).view(np.uint8).data)
    return _number(digest)


def _begun(path: Path, *place: int) -> Digest:
    digest = Digest()
    # File and place are part of the checksum: a sound bucket of another file or place does not pass for this
    # one.
    digest.update(" ".join([get_place_in_run(path), *map(str, place), ""]).encode())
    return digest


def _number(digest: Digest) -> int:
    return int(digest.text().partition(":")[2][:16], 16)


class BucketWriter:
    """Writes the buckets of a file one after the other."""

    def __init__(self, path: Path, num_buckets: int) -> None:
        """Begin a file; `path`: a temporary name."""
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115  (closed by `close`)
        self._places, self._digests = np.zeros(num_buckets + 1, _PLACE), np.zeros(num_buckets, _PLACE)
        # Room for the header, whose figures are known when the last bucket is written (`close`).
        np.array([num_buckets], _PLACE).tofile(self._file)
        self._places.tofile(self._file)
        self._digests.tofile(self._file)

    def append(self, bucket: int, records: Records) -> None:
        """Write all records of a bucket, behind those of the buckets before it."""
        if len(records):
            begin = int(self._places[bucket])
            self._digests[bucket] = _digest(self._path, bucket, begin, begin + len(records), records)
        # All later buckets begin behind this one, also those that stay empty.
        self._places[bucket + 1:] += np.uint64(len(records))
        records.tofile(self._file)

    def close(self) -> None:
        self._file.seek(_PLACE.itemsize)
        self._places.tofile(self._file)
        self._digests.tofile(self._file)
        self._file.close()


@dataclass(frozen=True)
class Slice:
    """The records of one bucket of a file, of which parts can be read."""

    path: Path
    dtype: np.dtype[Any]
    begin_bytes: int
    """Place of the first record in the file."""
    num_records: int

    def part(self, start: int, stop: int) -> Slice:
        """Return records `start` up to `stop` as a slice."""
        return Slice(self.path, self.dtype, self.begin_bytes + start * self.dtype.itemsize, stop - start)

    def read(self, start: int = 0, stop: int | None = None) -> Records:
        count = (self.num_records if stop is None else stop) - start
        if not count:
            return np.empty(0, self.dtype)
        with open(self.path, "rb") as f:
            f.seek(self.begin_bytes + start * self.dtype.itemsize)
            found: Records = np.fromfile(f, self.dtype, count)
        assert len(found) == count, f"{self.path}: is cut off"
        return found


def open_bucket(path: Path, dtype: np.dtype[Any], bucket: int) -> Slice:
    """Return a bucket of a file that `write_buckets` wrote; all of it is read once, for its checksum.

    Raises:
        UserError: it is damaged.
    """
    def number(f: Any, place: int) -> int:
        # A damaged header may name any place: it leads to the end of the file at most.
        f.seek(min(place * _PLACE.itemsize, size_bytes))
        return int.from_bytes(f.read(_PLACE.itemsize), "little")

    size_bytes = path.stat().st_size
    with open(path, "rb") as f:
        count = number(f, 0)
        begin, end = number(f, 1 + bucket), number(f, 2 + bucket)
        wanted = number(f, 2 + count + bucket)
        found = Slice(path, dtype, (2 + 2 * count) * _PLACE.itemsize + begin * dtype.itemsize, end - begin)
        if begin == end:
            # Nothing was hashed for an empty bucket.
            is_sound = wanted == 0
        else:
            digest, left = _begun(path, bucket, begin, end), (end - begin) * dtype.itemsize
            f.seek(min(found.begin_bytes, size_bytes))
            while left > 0 and (block := f.read(min(left, _BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
            is_sound = left == 0 and _number(digest) == wanted
    if not is_sound:
        raise UserError(f"{path}: is damaged (part {bucket} differs from its own checksum); "
                        f"{explain_deletion(path)}")
    return found


ROW_BITS = np.uint64(32)
ROW_MASK = np.uint64((1 << 32) - 1)
_OPEN_FILES = 64


class Numbering:
    """The ranks of a view's shards."""

    def __init__(self, view: View) -> None:
        # `sorted` is stable: shards of one priority keep the order of the pipeline.
        self.shards = sorted(view.shards, key=lambda shard: -view.get_priority(shard.source))
        """All shards; a shard's place here is its rank."""
        self.rank_by_shard = {shard: rank for rank, shard in enumerate(self.shards)}


def get_ranks(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (numbers >> ROW_BITS).astype(np.int64)


def get_rows(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (numbers & ROW_MASK).astype(np.int64)


class Register:
    """Row, length and id of the documents of each shard, in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def write(self, rank: int, documents: Sequence[tuple[int, int, str]]) -> None:
        """Write a shard's documents: row, characters and id of each, in order."""
        # Fixed width, so that the table can be mapped into memory and read at any row.
        ids = [id_.encode() for _, _, id_ in documents]
        width = max(map(len, ids), default=1)
        table = np.empty(len(ids), [("row", "<u4"), ("characters", "<u8"), ("id", f"S{width}")])
        for field, values in (("row", [r for r, _, _ in documents]),
                              ("characters", [c for _, c, _ in documents]), ("id", ids)):
            table[field] = values
        write_array(self._folder / f"{rank:06}.npy", table)

    def read(self, rank: int) -> NDArray[Any]:
        """Return a shard's documents: `row`, `characters`, `id`."""
        if rank not in self._open:
            self._open[rank] = read_array(self._folder / f"{rank:06}.npy")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(rank)
        return self._open[rank]

    def at(self, rank: int, wanted: NDArray[np.int64]) -> NDArray[Any]:
        table = self.read(rank)
        found: NDArray[Any] = table[np.searchsorted(table["row"], wanted)]
        return found

    def get_document_id(self, number: int) -> str:
        raw: bytes = self.at(number >> 32, np.array([number & 0xFFFFFFFF]))["id"][0]
        return raw.decode()


def register_documents(view: View, shard: ShardRef, register: Register, rank: int) -> Iterator[list[Doc]]:
    """Yield a shard's documents in batches, and write down what they are when all have been."""
    known: list[tuple[int, int, str]] = []
    for batch in view.iter_documents(shard):
        known += [(d.row, len(d.text), d.id) for d in batch]
        yield batch
    # Only here: a pass that is left early writes no register.
    register.write(rank, known)
