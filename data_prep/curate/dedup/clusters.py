"""Choose the near duplicates to drop by greedy selection over pairs of similar documents, in bounded memory.

Documents are considered by priority, length and number. A document is dropped only if a kept document is
similar (the kept documents are the lexicographically first maximal independent set in the graph of pairs). A
document stays if only dropped documents are similar.

A single pass over pairs in the order of first documents is enough: every earlier document is decided. Pairs
beyond the memory limit are distributed to files by quantiles (a sample sort).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.curate.dedup.minhash_loops import drop_similar, find_ranges
from data_prep.curate.dedup.work_files import (
    ROW_BITS, Numbering, Records, Register, create_bucket_file, get_ranks, get_rows, join_blocks, read_array)
from data_prep.curate.pipeline.step import View

EDGE = np.dtype([("order", "<u8"), ("first", "<u8"), ("second", "<u8")])
"""Two similar documents: place of `first` in `DocumentOrder`, and both numbers."""
DROPPED = np.dtype([("doc", "<u8"), ("keeper", "<u8")])
"""Numbers of a dropped document and a similar kept document."""
EDGES_IN_MEMORY = 1 << 23
"""Pairs sorted at a time, some 200 MB."""
_EDGE_BLOCK = 1 << 18
_CHARACTER_BITS = 40


class Clusters:
    """Selects dropped documents and their keepers.

    Keepers are in a sparse file: only parts with near duplicates take disk and memory.
    """

    def __init__(self, view: View, register: Register, folder: Path) -> None:
        """Create the file of keepers in `folder`, which is empty and receives temporary files."""
        self._numbering, self._folder = Numbering(view), folder
        # Earlier steps leave gaps between rows, so the last row counts and not the length of the table.
        counts = []
        for rank in range(len(view.shards)):
            last_row = register.read_table(rank)["row"][-1:]
            counts.append(int(last_row[0]) + 1 if len(last_row) else 0)
        self._begins = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        folder.mkdir(parents=True, exist_ok=True)
        # A new file of zeros has no blocks on the disk.
        num_places = max(1, int(self._begins[-1]))
        self._keepers = np.asarray(np.memmap(folder / "keepers", np.uint64, "w+", shape=(num_places,)))
        """uint64 [documents]: place of the keeper plus 1; 0: the document stays."""

    def select_documents(self, files: Sequence[Path]) -> None:
        """Choose the documents to drop; `files` hold `EDGE` records."""
        for edges in iter_edges_in_order(files, self._folder / "ranges"):
            drop_similar(self._keepers, self._compute_places(edges["first"]),
                         self._compute_places(edges["second"]))

    def write_dropped(self, path: Path) -> None:
        """Write a bucket file of `DROPPED` records with a bucket for each rank."""
        num_ranks = len(self._numbering.shards)
        with create_bucket_file(path, num_ranks) as append_bucket:
            for rank in range(num_ranks):
                begin, end = self._begins[rank:rank + 2].tolist()
                places = begin + np.flatnonzero(self._keepers[begin:end])
                if len(places):
                    dropped = np.empty(len(places), DROPPED)
                    dropped["doc"] = self._compute_numbers(places)
                    dropped["keeper"] = self._compute_numbers(self._keepers[places].astype(np.int64) - 1)
                    append_bucket(rank, dropped)

    def _compute_places(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        places: NDArray[np.int64] = self._begins[get_ranks(numbers)] + get_rows(numbers)
        return places

    def _compute_numbers(self, places: NDArray[np.int64]) -> NDArray[np.uint64]:
        # Empty shards begin at the same place as the next shard: the last of them has the document.
        rank = np.searchsorted(self._begins, places, side="right") - 1
        return (rank.astype(np.uint64) << ROW_BITS) | (places - self._begins[rank]).astype(np.uint64)


class DocumentOrder:
    """Order for selection: by priority, longest documents first, by number."""

    def __init__(self, view: View) -> None:
        shards = Numbering(view).shards
        priorities = sorted({view.get_priority(shard.source) for shard in shards}, reverse=True)
        self._class_by_rank = np.array(
            [priorities.index(view.get_priority(shard.source)) for shard in shards], np.uint64)

    def compute_places(self, numbers: NDArray[np.uint64], characters: NDArray[np.uint64]
                       ) -> NDArray[np.uint64]:
        """Return places [n] uint64 from numbers [n] and lengths [n]; equal for ties."""
        longest = np.uint64((1 << _CHARACTER_BITS) - 1)
        shortfall = longest - np.minimum(characters.astype(np.uint64), longest)
        classes: NDArray[np.uint64] = self._class_by_rank[get_ranks(numbers)]
        return classes << np.uint64(_CHARACTER_BITS) | shortfall

    def build_edges(self, pairs: NDArray[np.uint64], characters: NDArray[np.uint64]) -> Records:
        """Return `EDGE` records for pairs of numbers [n, 2] with lengths [n, 2]."""
        left, right = (self.compute_places(pairs[:, side], characters[:, side]) for side in (0, 1))
        is_swapped = (right < left) | ((right == left) & (pairs[:, 1] < pairs[:, 0]))
        edges = np.empty(len(pairs), EDGE)
        edges["order"] = np.where(is_swapped, right, left)
        edges["first"] = np.where(is_swapped, pairs[:, 1], pairs[:, 0])
        edges["second"] = np.where(is_swapped, pairs[:, 0], pairs[:, 1])
        return edges


def sort_edges(edges: Records) -> Records:
    """Sort edges by `order`, `first` and `second`, and remove repetitions."""
    edges = edges[np.lexsort((edges["second"], edges["first"], edges["order"]))]
    is_new = np.ones(len(edges), np.bool_)
    is_new[1:] = edges[1:] != edges[:-1]
    return edges[is_new]


def iter_edges_in_order(files: Sequence[Path], scratch: Path) -> Iterator[Records]:
    """Yield edges in sorted blocks.

    Args:
        files: unsorted arrays of `EDGE`.
        scratch: temporary folder; receives a copy if there are more than `EDGES_IN_MEMORY` edges.
    """
    num_edges = sum(len(read_array(file)) for file in files)
    num_ranges = -(-num_edges // EDGES_IN_MEMORY)
    if num_ranges <= 1:
        yield sort_edges(np.concatenate([np.empty(0, EDGE), *_iter_blocks(files)]))
        return
    # Bounds are quantiles of every `step`-th edge: ranges hold about equally many edges.
    step = max(1, num_edges // (1000 * num_ranges))
    sample = np.empty(0, EDGE)
    position = 0
    for block in _iter_blocks(files):
        sample = np.concatenate([sample, block[-position % step::step]])
        position += len(block)
    sample = sort_edges(sample)
    bounds = sample[np.linspace(0, len(sample), num_ranges, endpoint=False).astype(np.int64)[1:]]
    bound_orders, bound_firsts = (np.ascontiguousarray(bounds[name]) for name in ("order", "first"))
    scratch.mkdir(parents=True)
    ranges = [scratch / f"{number:06}" for number in range(num_ranges)]
    for block in _iter_blocks(files):
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


def _iter_blocks(files: Iterable[Path]) -> Iterator[Records]:
    # Copies: a process may hold only some 65,000 maps.
    arrays = (read_array(file) for file in files)
    return join_blocks((edges[start:start + _EDGE_BLOCK].copy() for edges in arrays
                        for start in range(0, len(edges), _EDGE_BLOCK)), _EDGE_BLOCK)
