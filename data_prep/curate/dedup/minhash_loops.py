"""The compiled loops of the search for near duplicates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import jit_compile

# The finalizer of MurmurHash3 for 64 bits.
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(33)


@jit_compile
def lower_signature(shingles: NDArray[np.uint32], factors: NDArray[np.uint32], terms: NDArray[np.uint32],
                  smallest: NDArray[np.uint32]) -> None:
    """Lower each number of a signature to the smallest image of the shingles."""
    for shingle in shingles:
        for i in range(len(factors)):
            image = np.uint32(shingle * factors[i] + terms[i])
            smallest[i] = min(smallest[i], image)


@jit_compile
def hash_bands(signatures: NDArray[np.uint32], keys: NDArray[np.uint64]) -> None:
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


@jit_compile
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


@jit_compile
def find_ranges(bound_orders: NDArray[np.uint64], bound_firsts: NDArray[np.uint64],
                orders: NDArray[np.uint64], firsts: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
    """Write for each (order, first) how many of the ascending bounds are not above it."""
    for i in range(len(orders)):
        low, high = 0, len(bound_orders)
        while low < high:
            middle = (low + high) // 2
            if (bound_orders[middle] < orders[i]
                    or (bound_orders[middle] == orders[i] and bound_firsts[middle] <= firsts[i])):
                low = middle + 1
            else:
                high = middle
        places[i] = low


@jit_compile
def drop_similar(keepers: NDArray[np.uint64], firsts: NDArray[np.int64], seconds: NDArray[np.int64]) -> None:
    """Drop the second document of each pair if the first one is kept and the second is not dropped yet.

    Args:
        keepers: of each document the place, plus one, of the kept document that it goes for; 0: it is kept.
        firsts: places of the first documents, in the order in which documents are considered.
        seconds: places of the second ones.
    """
    for i in range(len(firsts)):
        first, second = firsts[i], seconds[i]
        if keepers[first] == 0 and keepers[second] == 0:
            keepers[second] = np.uint64(first + 1)
