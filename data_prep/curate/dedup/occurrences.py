"""What occurs how often: keys of 128 bits counted over more documents than fit in memory.

A shard's keys are written sorted, cut into partitions by their first bits.  A partition is counted in ranges
of keys so narrow that about `RANGE_RECORDS` lie in each; within a range shard after shard is read twice,
first to count each key and find who has it first, then to list who has to give it up.  So neither more shards
nor a key that everybody has take more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.dedup.numbering import ranks
from data_prep.curate.dedup.work_files import Records, Slice, bucket_slice, parts_of, write_buckets
from megatron_sov.base.artifacts import new_folder

KEY_BYTES = 16
OCCURRENCE = np.dtype([("key", f"S{KEY_BYTES}"), ("doc", "<u8")])
"""A key, and the number of a document that has it."""
SURPLUS = np.dtype([("doc", "<u8"), ("keeper", "<u8"), ("key", f"S{KEY_BYTES}")])
"""A document, the first one that has the key too, and the key that it has to give up."""
RANGE_RECORDS = 1 << 20
_HALF = np.uint64(32)


@dataclass(frozen=True)
class OccurrenceRule:
    """Who has to give a key up."""

    max_documents: int = 1
    """In so many documents it may occur."""
    keeps_first: bool = True
    """Whether the first of them keeps it where it occurs in more."""


def key_partitions(keys: NDArray[Any], num_partitions: int) -> NDArray[np.int64]:
    """Return the partition of each key; it does not fall where keys ascend."""
    return ((_heads(keys) >> _HALF) * np.uint64(num_partitions) >> _HALF).astype(np.int64)


def write_occurrences(path: Path, keys: list[bytes], numbers: list[int], num_partitions: int) -> None:
    """Write a shard's keys, each with its document's number; a document has a key once."""
    records = np.empty(len(keys), OCCURRENCE)
    records["key"], records["doc"] = keys, numbers
    records = records[np.lexsort((records["doc"], records["key"]))]
    write_buckets(path, records, key_partitions(records["key"], num_partitions), num_partitions)


def write_surplus(files: list[Path], partition: int, folder: Path, rule: OccurrenceRule) -> None:
    """Find out in one partition of all shards' keys who has to give what up.

    Args:
        files: what `write_occurrences` wrote, by rank.
        partition: which.
        folder: receives files with a bucket for each rank.
        rule: who has to.
    """
    slices = [bucket_slice(file, OCCURRENCE, partition) for file in files]
    with new_folder(folder) as temporary:
        for number, block in enumerate(_blocks(_surplus(_ranges(slices), rule))):
            block = block[np.lexsort((block["key"], block["doc"]))]
            write_buckets(temporary / f"{number:06}", block, ranks(block["doc"]), len(files))


def read_surplus(folder: Path, rank: int) -> Records:
    """Return what the documents of a shard have to give up, sorted by document; `folder`: with the folders of
    all partitions."""
    found = [bucket_slice(file, SURPLUS, rank).read() for file in parts_of(folder)]
    joined: Records = np.concatenate([np.empty(0, SURPLUS), *found])
    return joined[np.argsort(joined["doc"], kind="stable")]


def _heads(keys: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the first 64 bits of keys."""
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, KEY_BYTES // 8)[:, 0].astype(np.uint64)


def _ranges(slices: list[Slice]) -> Iterator[list[Slice]]:
    """Yield the parts of slices that hold one range of keys, range after range."""
    total = sum(part.num_records for part in slices)
    num_ranges = -(-total // RANGE_RECORDS)
    if num_ranges <= 1:
        yield slices
        return
    heads = [_Heads(part) for part in slices if part.num_records]
    lowest = min(head.at(0) for head in heads)
    highest = max(head.at(head.part.num_records - 1) for head in heads)
    starts = [0] * len(heads)
    for number in range(1, num_ranges + 1):
        bound = lowest + (highest + 1 - lowest) * number // num_ranges
        stops = [head.first_from(bound, start) for head, start in zip(heads, starts, strict=True)]
        yield [head.part.part(start, stop)
               for head, start, stop in zip(heads, starts, stops, strict=True) if stop > start]
        starts = stops


@dataclass(frozen=True)
class _Heads:
    """The first bits of a slice's keys, read one by one."""

    part: Slice

    def at(self, place: int) -> int:
        return int(_heads(self.part.read(place, place + 1)["key"])[0])

    def first_from(self, bound: int, start: int) -> int:
        """Return the first place from `start` on whose key is not below a bound."""
        stop = self.part.num_records
        while start < stop:
            middle = (start + stop) // 2
            if self.at(middle) < bound:
                start = middle + 1
            else:
                stop = middle
        return start


def _surplus(ranges: Iterator[list[Slice]], rule: OccurrenceRule) -> Iterator[Records]:
    """Yield what has to be given up, in pieces."""
    for slices in ranges:
        keys, counts, firsts = _count(slices)
        often = counts > rule.max_documents
        keys, firsts = keys[often], firsts[often]
        if not len(keys):
            continue
        for part in slices:
            records = part.read()
            place = np.minimum(np.searchsorted(keys, records["key"]), len(keys) - 1)
            is_surplus = keys[place] == records["key"]
            if rule.keeps_first:
                is_surplus &= firsts[place] != records["doc"]
            found = np.empty(int(is_surplus.sum()), SURPLUS)
            found["doc"], found["key"] = records["doc"][is_surplus], records["key"][is_surplus]
            found["keeper"] = firsts[place[is_surplus]]
            yield found


def _count(slices: list[Slice]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint64]]:
    """Return the keys of slices, in how many documents each occurs, and the number of the first."""
    keys = np.empty(0, OCCURRENCE["key"])
    counts, firsts = np.empty(0, np.int64), np.empty(0, np.uint64)
    for block in _blocks(part.read() for part in slices):
        keys = np.concatenate([keys, block["key"]])
        counts = np.concatenate([counts, np.ones(len(block), np.int64)])
        firsts = np.concatenate([firsts, block["doc"]])
        order = np.argsort(keys, kind="stable")
        keys, counts, firsts = keys[order], counts[order], firsts[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        keys = keys[starts]
        counts, firsts = np.add.reduceat(counts, starts), np.minimum.reduceat(firsts, starts)
    return keys, counts, firsts


def _blocks(pieces: Iterator[Records]) -> Iterator[Records]:
    """Join pieces until they have about `RANGE_RECORDS`; none is yielded empty."""
    held: list[Records] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= RANGE_RECORDS:
            yield np.concatenate(held)
            held, count = [], 0
    if count:
        yield np.concatenate(held)
