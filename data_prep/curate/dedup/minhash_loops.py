"""The compiled loops of the search for near duplicates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import compiled

# The finalizer of MurmurHash3 for 64 bits.
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(33)


@compiled
def take_smallest(shingles: NDArray[np.uint32], factors: NDArray[np.uint32], terms: NDArray[np.uint32],
                  smallest: NDArray[np.uint32]) -> None:
    """Lower each number of a signature to the smallest image of the shingles."""
    for shingle in shingles:
        for i in range(len(factors)):
            image = np.uint32(shingle * factors[i] + terms[i])
            smallest[i] = min(smallest[i], image)


@compiled
def key_bands(signatures: NDArray[np.uint32], keys: NDArray[np.uint64]) -> None:
    """Hash the numbers of each band of each signature, and the band's own; `keys` [n, bands] receives it."""
    rows = signatures.shape[1] // keys.shape[1]
    for i in range(len(signatures)):
        for band in range(keys.shape[1]):
            # The band goes into its hash: the same numbers in another band are another key.
            value = np.uint64(band + 1)
            for row in range(rows):
                value = (value ^ np.uint64(signatures[i, band * rows + row])) * _MIX_1
                value = (value ^ (value >> _HALF)) * _MIX_2
                value = value ^ (value >> _HALF)
            keys[i, band] = value


@compiled
def count_common(ones: NDArray[np.uint64], one_begins: NDArray[np.int64], others: NDArray[np.uint64],
                 other_begins: NDArray[np.int64], pairs: NDArray[np.int64],
                 common: NDArray[np.int64]) -> None:
    """Count what pairs of sets have in common.

    Args:
        ones: all sets of one side one after the other, each ascending.
        one_begins: where each begins, and where the last ends.
        others: those of the other side.
        other_begins: likewise.
        pairs: [n, 2], numbers of a set of either side.
        common: receives the counts.
    """
    for i in range(len(pairs)):
        a, a_end = one_begins[pairs[i, 0]], one_begins[pairs[i, 0] + 1]
        b, b_end = other_begins[pairs[i, 1]], other_begins[pairs[i, 1] + 1]
        count = 0
        while a < a_end and b < b_end:
            if ones[a] == others[b]:
                count += 1
                a += 1
                b += 1
            elif ones[a] < others[b]:
                a += 1
            else:
                b += 1
        common[i] = count


@compiled
def unite(parents: NDArray[np.uint64], ones: NDArray[np.int64], others: NDArray[np.int64]) -> None:
    """Unite the clusters of pairs; the smallest of a cluster is its root.

    Args:
        parents: of each document, plus one; 0: it is in no cluster.
        ones: places in `parents`.
        others: those that belong to the same cluster.
    """
    for i in range(len(ones)):
        a, b = root(parents, ones[i]), root(parents, others[i])
        if a < b:
            # The smaller place becomes the root, so the result does not depend on the order of the pairs.
            parents[b] = np.uint64(a + 1)
        else:
            parents[a] = np.uint64(b + 1)


@compiled
def root(parents: NDArray[np.uint64], place: np.int64) -> np.int64:
    """Return the root of a document's cluster, which it becomes the root of where it is in none; halves the
    way there."""
    if parents[place] == 0:
        parents[place] = np.uint64(place + 1)
        return place
    above = np.int64(parents[place]) - 1
    while above != place:
        higher = np.int64(parents[above]) - 1
        parents[place] = np.uint64(higher + 1)
        place, above = above, higher
    return place


@compiled
def find_roots(parents: NDArray[np.uint64], places: NDArray[np.int64], roots: NDArray[np.int64]) -> None:
    """Write the root of each of some documents that are in a cluster."""
    for i in range(len(places)):
        roots[i] = root(parents, places[i])
