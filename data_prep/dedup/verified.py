"""Candidates compared shingle by shingle: the exact Jaccard similarity of pairs, in files per shard."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.candidates import PAIR
from data_prep.dedup.numbering import ranks, rows
from data_prep.dedup.signatures import shingles
from data_prep.dedup.work_files import bucket_slice, new_file, parts_of, write_buckets
from data_prep.pipeline.step import Doc
from data_prep.shard_damage import place_in_run, way_out
from megatron_sov.sealed import PLACE, check_seal, seal_file

PAIR_BLOCK = 1 << 18


def write_pairs(file: Path, pairs: NDArray[np.uint64], num_ranks: int) -> None:
    """Write pairs of numbers [n, 2], each for the shards of both, once."""
    both = distinct(np.concatenate([pairs, pairs[:, ::-1]]))
    records = np.empty(len(both), PAIR)
    records["own"], records["other"] = both[:, 0], both[:, 1]
    write_buckets(file, records, ranks(records["own"]), num_ranks)


def read_pairs(folder: Path, rank: int) -> NDArray[np.uint64]:
    """Return the pairs of a shard's documents [n, 2], its own first, ascending; `folder`: with those of all
    partitions."""
    found = [bucket_slice(file, PAIR, rank).read() for file in parts_of(folder)]
    joined = np.concatenate([np.empty(0, PAIR), *found])
    return distinct(np.stack([joined["own"], joined["other"]], axis=1))


def distinct(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return different pairs [n, 2], ascending; `np.unique` sorts rows as bytes, which takes several times
    as long."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    is_new = np.ones(len(pairs), np.bool_)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[is_new]


class ShingleSets:
    """The shingles of those documents of a shard that are candidates.

    One file: each task of the comparison opens those of all other shards.  Behind the sets it has the rows,
    where each row's set begins, and how many rows there are.
    """

    def __init__(self, file: Path) -> None:
        check_seal(file, way_out(file), place_in_run(file))
        with open(file, "rb") as f:  # a copy on write: compiled loops take arrays that may be written to
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        words = np.frombuffer(mapped, np.uint64, (len(mapped) - len(PLACE)) // np.uint64().nbytes)
        places = 2 * int(words[-1]) + 2
        self.shingles: NDArray[np.uint64] = words[:-places]
        self.rows, self.begins = np.split(words[-places:-1].view(np.int64), [int(words[-1])])

    def places(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where rows stand among the sets."""
        return np.searchsorted(self.rows, wanted)

    @staticmethod
    def write(file: Path, documents: Iterator[list[Doc]], wanted: NDArray[np.int64], words: int) -> None:
        """Write the sets of rows of a shard."""
        keep = set(wanted.tolist())
        begins = [0]
        with new_file(file) as temporary, open(temporary, "wb") as f:
            for batch in documents:
                for document in batch:
                    if document.row in keep:
                        found = shingles(document.text, words)
                        found.tofile(f)
                        begins.append(begins[-1] + len(found))
            np.array([*np.sort(wanted).tolist(), *begins, len(wanted)], np.uint64).tofile(f)
            seal_file(temporary, place_in_run(file))


def similar_pairs(pairs: NDArray[np.uint64], folder: Path, rank: int, threshold: float
                  ) -> Iterator[NDArray[np.uint64]]:
    """Yield those of a shard's pairs [n, 2] whose Jaccard similarity is at least the threshold.

    Args:
        pairs: the shard's own first.
        folder: of the sets of all shards, by rank.
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
