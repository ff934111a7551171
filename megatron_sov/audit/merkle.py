"""The tree of hashes of RFC 6962, whose root stands for a list, and the path by which one of the list
leads to the root without the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def merkle_root(leaves: Sequence[bytes]) -> str:
    """Return the root of the tree of RFC 6962: a leaf's hash begins with 0, a node's with 1, and the left
    half is the largest power of two below the number of leaves."""
    return _tree_hash(leaves).hex()


def _tree_hash(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + _tree_hash(leaves[:half]) + _tree_hash(leaves[half:])).digest()


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[str]:
    """Return the hashes by which a leaf leads to the root, the leaf's neighbour first (RFC 6962, section
    2.1.1)."""
    if len(leaves) < 2:
        return []
    half = 1 << (len(leaves) - 1).bit_length() - 1
    if index < half:
        return [*inclusion_path(leaves[:half], index), merkle_root(leaves[half:])]
    return [*inclusion_path(leaves[half:], index - half), merkle_root(leaves[:half])]


def root_by_path(leaf: bytes, index: int, size: int, path: Sequence[str]) -> str:
    """Return the root of a tree of so many leaves, by one of them and its path (RFC 9162, section 2.1.3.2).

    Raises:
        ValueError: the path is of another leaf or another tree.
    """
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is none of {size}")
    found, place, last = hashlib.sha256(b"\0" + leaf).digest(), index, size - 1
    for text in path:
        if last == 0:
            raise ValueError("its path is too long")
        other = bytes.fromhex(text)
        is_right = bool(place & 1) or place == last
        found = hashlib.sha256(b"\1" + (other + found if is_right else found + other)).digest()
        while is_right and not place & 1 and place:
            # a node without a sibling at the right edge rises as it is
            place, last = place >> 1, last >> 1
        place, last = place >> 1, last >> 1
    if last:
        raise ValueError("its path is too short")
    return found.hex()
