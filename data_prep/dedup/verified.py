"""Candidates compared shingle by shingle: the exact Jaccard similarity of pairs, in files per shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.candidates import PAIR
from data_prep.dedup.numbering import ranks, rows
from data_prep.dedup.signatures import shingles
from data_prep.dedup.work_files import (
    bucket_slice,
    new_folder,
    parts_of,
    read_array,
    save_array,
    write_buckets,
)
from data_prep.pipeline.step import Doc

PAIR_BLOCK = 1 << 18


def write_pairs(file: Path, pairs: NDArray[np.uint64], num_ranks: int) -> None:
    """Write pairs of numbers [n, 2], each for the shards of both, once."""
    both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    records = np.empty(len(both), PAIR)
    records["own"], records["other"] = both[:, 0], both[:, 1]
    write_buckets(file, records, ranks(records["own"]), num_ranks)


def read_pairs(folder: Path, rank: int) -> NDArray[np.uint64]:
    """Return the pairs of a shard's documents [n, 2], its own first, ascending; `folder`: with those of all
    partitions."""
    found = [bucket_slice(file, PAIR, rank).read() for file in parts_of(folder)]
    joined = np.concatenate([np.empty(0, PAIR), *found])
    return np.unique(np.stack([joined["own"], joined["other"]], axis=1), axis=0)


class ShingleSets:
    """The shingles of those documents of a shard that are candidates."""

    def __init__(self, folder: Path) -> None:
        self.rows = read_array(folder / "rows.npy")
        self.begins: NDArray[np.int64] = read_array(folder / "begins.npy")
        self.shingles: NDArray[np.uint64] = read_array(folder / "shingles.npy")

    def places(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where rows stand among the sets."""
        return np.searchsorted(self.rows, wanted)

    @staticmethod
    def write(folder: Path, documents: Iterator[list[Doc]], wanted: NDArray[np.int64], words: int) -> None:
        """Write the sets of rows of a shard."""
        keep = set(wanted.tolist())
        sizes: list[int] = []
        with new_folder(folder) as temporary:
            with open(temporary / "raw", "wb") as f:
                for batch in documents:
                    for document in batch:
                        if document.row in keep:
                            found = shingles(document.text, words)
                            found.tofile(f)
                            sizes.append(len(found))
            joined: NDArray[Any] = np.empty(0, np.uint64)
            if sum(sizes):
                joined = np.memmap(temporary / "raw", np.uint64, "r")
            for name, array in (("rows", np.sort(wanted)), ("shingles", joined),
                                ("begins", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))):
                save_array(temporary / f"{name}.npy", np.asarray(array))
            (temporary / "raw").unlink()


def similar_pairs(pairs: NDArray[np.uint64], folder: Path, rank: int, threshold: float
                  ) -> Iterator[NDArray[np.uint64]]:
    """Yield those of a shard's pairs [n, 2] whose Jaccard similarity is at least the threshold.

    Args:
        pairs: the shard's own first.
        folder: of the sets of all shards.
        rank: of the shard.
        threshold: in (0, 1].
    """
    from data_prep.dedup import minhash_loops

    pairs = pairs[pairs[:, 0] > pairs[:, 1]]
    own = ShingleSets(folder / f"{rank:06}")
    for other_rank in np.unique(ranks(pairs[:, 1])).tolist():
        other = ShingleSets(folder / f"{other_rank:06}")
        chosen = pairs[ranks(pairs[:, 1]) == other_rank]
        for start in range(0, len(chosen), PAIR_BLOCK):
            block = chosen[start:start + PAIR_BLOCK]
            places = np.stack([own.places(rows(block[:, 0])), other.places(rows(block[:, 1]))], axis=1)
            common = np.empty(len(block), np.int64)
            minhash_loops.count_common(own.shingles, own.begins, other.shingles, other.begins, places, common)
            sizes = (np.diff(own.begins)[places[:, 0]] + np.diff(other.begins)[places[:, 1]])
            yield block[common >= threshold * (sizes - common)]
