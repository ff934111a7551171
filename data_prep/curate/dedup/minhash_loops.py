"""Compiled loops for near-duplicate search."""

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import jit_compile

# Constants of MurmurHash3's 64-bit finalizer.
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(33)


@jit_compile
def lower_signature(shingles: NDArray[np.uint32], factors: NDArray[np.uint32], terms: NDArray[np.uint32],
                    signature: NDArray[np.uint32]) -> None:
    """Lower `signature[i]` to the minimum over all shingles of ``shingle * factors[i] + terms[i]``."""
    for shingle in shingles:
        for i in range(len(factors)):
            image = np.uint32(shingle * factors[i] + terms[i])
            signature[i] = min(signature[i], image)


@jit_compile
def hash_bands(signatures: NDArray[np.uint32], keys: NDArray[np.uint64]) -> None:
    """Hash the bands in signatures [n, bands x rows], with the band number, into `keys` [n, bands]."""
    rows = signatures.shape[1] // keys.shape[1]
    for i in range(len(signatures)):
        for band in range(keys.shape[1]):
            # The hash starts from the band: equal numbers in different bands have different keys.
            value = np.uint64(band + 1)
            for row in range(rows):
                value = (value ^ np.uint64(signatures[i, band * rows + row])) * _MIX_1
                value = (value ^ (value >> _HALF)) * _MIX_2
                value = value ^ (value >> _HALF)
            keys[i, band] = value


@jit_compile
def count_common(left: NDArray[np.uint64], left_begins: NDArray[np.int64], right: NDArray[np.uint64],
                 right_begins: NDArray[np.int64], pairs: NDArray[np.int64],
                 common: NDArray[np.int64]) -> None:
    """Count common elements between sets.

    Args:
        left: concatenated ascending sets.
        left_begins: begins in `left`, and the total number of elements.
        right: concatenated ascending sets.
        right_begins: begins in `right`, and the total number of elements.
        pairs: [n, 2], index of a left set and a right set.
        common: [n], receives the counts.
    """
    for i in range(len(pairs)):
        a, a_end = left_begins[pairs[i, 0]], left_begins[pairs[i, 0] + 1]
        b, b_end = right_begins[pairs[i, 1]], right_begins[pairs[i, 1] + 1]
        count = 0
        while a < a_end and b < b_end:
            if left[a] == right[b]:
                count += 1
                a += 1
                b += 1
            elif left[a] < right[b]:
                a += 1
            else:
                b += 1
        common[i] = count


@jit_compile
def find_ranges(bound_orders: NDArray[np.uint64], bound_firsts: NDArray[np.uint64],
                orders: NDArray[np.uint64], firsts: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
    """Count the ascending bounds at or below (order, first) into `places` [n]."""
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
    """Drop a pair's second document if the first stays and the second is not dropped yet.

    Args:
        keepers: [documents], place of the keeper plus 1; 0: the document stays.
        firsts: [n], places in selection order.
        seconds: [n], places.
    """
    for i in range(len(firsts)):
        first, second = firsts[i], seconds[i]
        if keepers[first] == 0 and keepers[second] == 0:
            keepers[second] = np.uint64(first + 1)
