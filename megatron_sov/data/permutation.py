"""Shuffling without a list: a keyed permutation of [0, n) that is computed one index at a time."""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """A pseudo-random permutation of `size` indices, a function of its key alone.

    A balanced Feistel network over the next even power of two, walked along its cycle until the result is below `size`
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).  Memory does not grow with `size`.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i:8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Return where `index` goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a permutation of {self.size}")
        value = self._encrypt(index)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        bits, mask = self._half_bits, (1 << self._half_bits) - 1
        left, right = value >> bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << bits | right


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31
