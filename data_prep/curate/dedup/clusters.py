"""Which near duplicates go: greedy selection over pairs of similar documents, in memory that is bounded.

Documents are considered in order of priority, length and number.  A document is kept unless a kept one is
similar to it (the lexicographically first maximal independent set of the graph of similar pairs).  Similarity
is not passed on: a document that is similar only to documents that go is kept.

Each pair is written with the document that comes first in this order.  Pairs in the order of their first
documents decide everything in one pass: when a document's pairs are reached, all documents before it are
decided.  More pairs than fit into memory are distributed to files by quantiles of the order (a sample sort).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.dedup.work_files import (
    ROW_BITS, BucketWriter, Numbering, Records, Register, get_ranks, get_rows, read_array)
from data_prep.curate.pipeline.step import View
from megatron_sov.base.artifacts import create_file

EDGE = np.dtype([("order", "<u8"), ("first", "<u8"), ("second", "<u8")])
"""A pair of similar documents: place of the first one in the order of documents, and the numbers of both."""
DROPPED = np.dtype([("doc", "<u8"), ("keeper", "<u8")])
"""Numbers of a document that goes, and of the kept one that it is similar to."""
EDGES_IN_MEMORY = 1 << 23
"""Pairs that are sorted at a time, some 200 MB of records."""
_EDGE_BLOCK = 1 << 18
_CHARACTER_BITS = 40


class DocumentOrder:
    """The order in which documents are considered for keeping: by priority, longest first; ties go to the
    smaller number."""

    def __init__(self, view: View) -> None:
        shards = Numbering(view).shards
        priorities = sorted({view.get_priority(shard.source) for shard in shards}, reverse=True)
        self._class_of = np.array([priorities.index(view.get_priority(shard.source)) for shard in shards],
                                  np.uint64)

    def of(self, numbers: NDArray[np.uint64], characters: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the place of documents [n] uint64, the smaller the earlier, given their lengths."""
        longest = np.uint64((1 << _CHARACTER_BITS) - 1)
        shortfall = longest - np.minimum(characters.astype(np.uint64), longest)
        classes: NDArray[np.uint64] = self._class_of[get_ranks(numbers)]
        return classes << np.uint64(_CHARACTER_BITS) | shortfall

    def build_edges(self, pairs: NDArray[np.uint64], characters: NDArray[np.uint64]) -> Records:
        """Return the records of pairs of numbers [n, 2] of documents of so many characters [n, 2]."""
        own, other = (self.of(pairs[:, side], characters[:, side]) for side in (0, 1))
        is_swapped = (other < own) | ((other == own) & (pairs[:, 1] < pairs[:, 0]))
        edges = np.empty(len(pairs), EDGE)
        edges["order"] = np.where(is_swapped, other, own)
        edges["first"] = np.where(is_swapped, pairs[:, 1], pairs[:, 0])
        edges["second"] = np.where(is_swapped, pairs[:, 0], pairs[:, 1])
        return edges


def sort_edges(edges: Records) -> Records:
    """Return pairs by the order of their first documents, without repetitions."""
    edges = edges[np.lexsort((edges["second"], edges["first"], edges["order"]))]
    is_new = np.ones(len(edges), np.bool_)
    is_new[1:] = edges[1:] != edges[:-1]
    return edges[is_new]


def iter_edges_in_order(files: Sequence[Path], scratch: Path) -> Iterator[Records]:
    """Yield the pairs of files in blocks, by the order of their first documents.

    Args:
        files: arrays of `EDGE` in any order.
        scratch: temporary folder; receives a copy of the pairs where they exceed `EDGES_IN_MEMORY`.
    """
    from data_prep.curate.dedup.minhash_loops import find_ranges

    num_edges = sum(len(read_array(file)) for file in files)
    num_ranges = -(-num_edges // EDGES_IN_MEMORY)
    if num_ranges <= 1:
        yield sort_edges(np.concatenate([np.empty(0, EDGE), *_blocks(files)]))
        return
    # Quantiles of every `step`-th pair: a range has about as many pairs as any other.
    step = max(1, num_edges // (1000 * num_ranges))
    sample = np.empty(0, EDGE)
    position = 0
    for block in _blocks(files):
        sample = np.concatenate([sample, block[-position % step::step]])
        position += len(block)
    sample = sort_edges(sample)
    bounds = sample[np.linspace(0, len(sample), num_ranges, endpoint=False).astype(np.int64)[1:]]
    bound_orders, bound_firsts = (np.ascontiguousarray(bounds[name]) for name in ("order", "first"))
    scratch.mkdir(parents=True)
    ranges = [scratch / f"{number:06}" for number in range(num_ranges)]
    for block in _blocks(files):
        places = np.empty(len(block), np.int64)
        find_ranges(bound_orders, bound_firsts, np.ascontiguousarray(block["order"]),
                    np.ascontiguousarray(block["first"]), places)
        for number in np.unique(places).tolist():
            with open(ranges[number], "ab") as f:
                block[places == number].tofile(f)
    for file in ranges:
        if file.exists():
            yield sort_edges(np.fromfile(file, EDGE))
            file.unlink()


def _blocks(files: Iterable[Path]) -> Iterator[Records]:
    """Yield the records of files, joined to blocks of at least `_EDGE_BLOCK` where there are as many."""
    waiting: list[Records] = []
    count = 0
    for file in files:
        edges = read_array(file)
        for start in range(0, len(edges), _EDGE_BLOCK):
            # A copy: a process may map some 65,000 files at most.
            waiting.append(edges[start:start + _EDGE_BLOCK].copy())
            count += len(waiting[-1])
            if count >= _EDGE_BLOCK:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


class Clusters:
    """Kept documents with the near duplicates that go for each.

    A number for each document of the corpus lies in a sparse file, of which only parts with near duplicates
    take room on the disk and in memory.
    """

    def __init__(self, view: View, register: Register, folder: Path) -> None:
        """Begin with all documents kept; `folder`: empty, for temporary files."""
        self._numbering, self._folder = Numbering(view), folder
        # Earlier steps leave gaps between the rows of a shard, so its last row and not its length says how
        # much room its documents need.
        last_rows = (register.read(rank)["row"][-1:] for rank in range(len(view.shards)))
        counts = [int(last[0]) + 1 if len(last) else 0 for last in last_rows]
        self._begins = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._keepers = self._create_numbers("keepers")
        """Of each document the place of the kept one that it goes for, plus one; 0: it is kept."""

    def select(self, files: Sequence[Path]) -> None:
        """Decide which documents go; `files`: arrays of `EDGE`."""
        from data_prep.curate.dedup.minhash_loops import drop_similar

        for edges in iter_edges_in_order(files, self._folder / "ranges"):
            drop_similar(self._keepers, self._places(edges["first"]), self._places(edges["second"]))

    def write_dropped(self, path: Path) -> None:
        """Write the documents that go, in the order of `Numbering`, with a bucket for each rank."""
        with create_file(path, create_parents=True) as temporary:
            writer = BucketWriter(temporary, len(self._numbering.shards))
            for rank, places in self._nonzero(self._keepers):
                dropped = np.empty(len(places), DROPPED)
                dropped["doc"] = self._numbers(places)
                dropped["keeper"] = self._numbers(self._keepers[places].astype(np.int64) - 1)
                writer.append(rank, dropped)
            writer.close()

    def _create_numbers(self, name: str) -> NDArray[np.uint64]:
        """Return a zero for each document, in a file without blocks until it is written to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return np.asarray(np.memmap(self._folder / name, np.uint64, "w+",
                                    shape=(max(1, int(self._begins[-1])),)))

    def _places(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        places: NDArray[np.int64] = self._begins[get_ranks(numbers)] + get_rows(numbers)
        return places

    def _numbers(self, places: NDArray[np.int64]) -> NDArray[np.uint64]:
        # Of several shards that begin at one place the last is the one that is not empty.
        rank = np.searchsorted(self._begins, places, side="right") - 1
        return (rank.astype(np.uint64) << ROW_BITS) | (places - self._begins[rank]).astype(np.uint64)

    def _nonzero(self, values: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each shard's rank with the places of its documents that have a value."""
        for rank in range(len(self._numbering.shards)):
            begin, end = self._begins[rank:rank + 2].tolist()
            places = begin + np.flatnonzero(values[begin:end])
            if len(places):
                yield rank, places
