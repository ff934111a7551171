"""A table of words and how often they were seen, in arrays that grow."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenizer.bpe.counting import NUMBER_BITS, NUMBER_MASK, add_words, move_slots

Number = TypeVar("Number", bound=np.generic)
FIRST_SLOTS = 1 << 16
PART_BITS = 6
NUM_PARTS = 1 << PART_BITS
"""Parts into which words are divided by their hash."""


class WordCounter:
    """Counts words."""

    def __init__(self) -> None:
        self._slots: NDArray[np.uint64] = np.zeros(FIRST_SLOTS, np.uint64)
        self._text: NDArray[np.uint8] = np.empty(1 << 20, np.uint8)
        self._ends: NDArray[np.int64] = np.empty(FIRST_SLOTS, np.int64)
        self._counts: NDArray[np.int64] = np.empty(FIRST_SLOTS, np.int64)
        self._size = 0

    def __len__(self) -> int:
        """Return how many distinct words there are."""
        return self._size

    def add(self, raw: bytes, ends: NDArray[np.int32], times: int) -> None:
        """Count the words of a text, which end at `ends`, each `times` times."""
        most = self._size + len(ends)
        self._text = _with_room(self._text, self.text_bytes() + len(raw))
        self._ends, self._counts = _with_room(self._ends, most), _with_room(self._counts, most)
        if 2 * most > len(self._slots):
            larger = np.zeros(1 << (2 * most).bit_length(), np.uint64)
            move_slots(self._slots, larger)
            self._slots = larger
        self._size = add_words(np.frombuffer(raw, np.uint8), ends, times, self._slots, self._text, self._ends,
                               self._counts, self._size)

    def text_bytes(self) -> int:
        """Return how many bytes the distinct words have in all."""
        return int(self._ends[self._size - 1]) if self._size else 0

    def words(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the bytes of all words, one after another, and for each word where it ends,
        its count and its part."""
        used = self._slots[self._slots != 0]
        parts = np.empty(self._size, np.int64)
        parts[(used & NUMBER_MASK).astype(np.int64) - 1] = used >> np.uint64(2 * int(NUMBER_BITS) - PART_BITS)
        return (self._text[: self.text_bytes()], self._ends[: self._size], self._counts[: self._size],
                parts)

    def clear(self) -> None:
        """Forget all words."""
        self._slots[:] = 0
        self._size = 0


def _with_room(array: NDArray[Number], size: int) -> NDArray[Number]:
    """Return an array with room for `size`, and what is in it."""
    if size <= len(array):
        return array
    grown = np.empty(max(size, len(array) + len(array) // 2), array.dtype)
    grown[: len(array)] = array
    return grown
