"""Shuffling without a list: a keyed permutation of [0, n) that is computed for any stretch of indices."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_U = np.uint64


class Permutation:
    """A pseudo-random permutation of `size` indices, a function of its key alone.

    A balanced Feistel network over the next power of four, walked along its cycle until the result is below
    `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002).  Memory does not grow with `size`.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._half_bits, self._mask = _U(half_bits), _U((1 << half_bits) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def span(self, first: int, last: int) -> np.ndarray:
        """Return [last - first] int64: where the indices first, ..., last - 1 go.

        Raises:
            IndexError: one of them lies outside.
        """
        if not 0 <= first <= last <= self.size:
            raise IndexError(f"indices {first} to {last - 1} are not all inside a permutation of {self.size}")
        values = self._encrypt(np.arange(first, last, dtype=np.uint64))
        while len(outside := np.flatnonzero(values >= _U(self.size))):
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), modulo 2^64."""
    x = x + _U(0x9E3779B97F4A7C15)
    x = (x ^ x >> _U(30)) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ x >> _U(27)) * _U(0x94D049BB133111EB)
    return x ^ x >> _U(31)
