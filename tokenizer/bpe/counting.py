"""The compiled loops of counting: text into words, words into a table of counts.

Words are looked up by open addressing.  A slot is empty (0), or the hash of a word in its upper 32 bits and
the word's number + 1 in the lower ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import jit_compile

NUMBER_BITS = np.uint64(32)
NUMBER_MASK = np.uint64((1 << 32) - 1)
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)


@jit_compile
def split_words(raw: NDArray[np.uint8], kinds: NDArray[np.uint8], steps: NDArray[np.int32],
                ends: NDArray[np.int32]) -> int:
    """Split UTF-8 text; matches and the text between them are words.

    Args:
        raw: the text.
        kinds: as `tokenizer.bpe.split_pattern.Automaton` has them.
        steps: likewise.
        ends: receives where each word ends; room for one per byte.

    Returns:
        How many words there are.
    """
    # the last column is the end of the text, so a look ahead has an answer there too
    at_end = steps.shape[1] - 1
    num_words, begin, at = 0, 0, 0
    while at < len(raw):
        state, place, matched = 1, at, -1
        while True:
            kind, size = at_end, 0
            if place < len(raw):
                code, size = _decode_code_point(raw, place)
                kind = np.int64(kinds[code])
            step = steps[state, kind]
            # the match that ends here is remembered; a longer one may follow
            if step & 1:
                matched = place
            state = step >> 1
            if not state:
                break
            place += size
        # no match begins here: this character belongs to the text between matches
        if matched < 0:
            at += _decode_code_point(raw, at)[1]
            continue
        if begin < at:
            ends[num_words] = at
            num_words += 1
        ends[num_words] = matched
        num_words += 1
        # patterns match no empty text, so this always moves on
        begin = at = matched
    if begin < len(raw):
        ends[num_words] = len(raw)
        num_words += 1
    return num_words


@jit_compile
def _decode_code_point(raw: NDArray[np.uint8], place: int) -> tuple[np.int64, int]:
    """Return the character at a place of UTF-8 text, and how many bytes it has."""
    byte = np.int64(raw[place])
    if byte < 0x80:
        return byte, 1
    second = raw[place + 1] & 0x3F
    if byte < 0xE0:
        return (byte & 0x1F) << 6 | second, 2
    third = raw[place + 2] & 0x3F
    if byte < 0xF0:
        return (byte & 0x0F) << 12 | second << 6 | third, 3
    return (byte & 0x07) << 18 | second << 12 | third << 6 | (raw[place + 3] & 0x3F), 4


@jit_compile
def add_words(raw: NDArray[np.uint8], ends: NDArray[np.int32], times: int, slots: NDArray[np.uint64],
              text: NDArray[np.uint8], word_ends: NDArray[np.int64], counts: NDArray[np.int64],
              num_words: int) -> int:
    """Count words, each `times` times.

    Args:
        raw: text.
        ends: where its words end.
        times: how often the text is seen.
        slots: twice as many as words, at least, and a power of two.
        text: bytes of the words known so far, one after another; room for all of `raw`.
        word_ends: where each word's bytes end; room for a word more than is known for each of `ends`.
        counts: how often each was seen; likewise.
        num_words: words known so far.

    Returns:
        How many are known now.
    """
    mask, begin = np.uint64(len(slots) - 1), np.int64(0)
    for end in ends:
        hash_ = _FNV_OFFSET
        for i in range(begin, end):
            hash_ = (hash_ ^ np.uint64(raw[i])) * _FNV_PRIME
        # FNV leaves the low bits weak for short words: the mix spreads them, 32 bits fit the slot
        hash_ = (hash_ ^ (hash_ >> NUMBER_BITS)) * _MIX >> NUMBER_BITS
        at = hash_ & mask
        while True:
            # number + 1, so that 0 means empty
            slot = slots[at]
            if not slot:
                slots[at] = (hash_ << NUMBER_BITS) | np.uint64(num_words + 1)
                start = word_ends[num_words - 1] if num_words else 0
                for i in range(end - begin):
                    text[start + i] = raw[begin + i]
                word_ends[num_words] = start + end - begin
                counts[num_words] = times
                num_words += 1
                break
            # the bytes are compared where the hashes agree: 32 bits collide among millions of words
            if slot >> NUMBER_BITS == hash_:
                number = np.int64(slot & NUMBER_MASK) - 1
                start = word_ends[number - 1] if number else 0
                if word_ends[number] - start == end - begin and _is_equal(raw, begin, text, start,
                                                                          end - begin):
                    counts[number] += times
                    break
            # linear probing; the table is at most half full, so runs stay short
            at = (at + _ONE) & mask
        begin = np.int64(end)
    return num_words


@jit_compile
def _is_equal(a: NDArray[np.uint8], start_a: np.int64, b: NDArray[np.uint8], start_b: int,
              length: int) -> bool:
    for i in range(length):  # noqa: SIM110 - numba compiles no generators
        if a[start_a + i] != b[start_b + i]:
            return False
    return True


@jit_compile
def move_slots(slots: NDArray[np.uint64], larger: NDArray[np.uint64]) -> None:
    """Enter the words of a table of slots into a larger, empty one."""
    mask = np.uint64(len(larger) - 1)
    for slot in slots:
        if slot:
            at = (slot >> NUMBER_BITS) & mask
            while larger[at]:
                at = (at + _ONE) & mask
            # no bytes are compared: the words of a table differ already
            larger[at] = slot


# A table of words and how often they were seen, in arrays that grow.

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
        # room for the worst case, every word new, before the compiled loop that cannot grow arrays
        most = self._size + len(ends)
        self._text = _grow_array(self._text, self.text_bytes() + len(raw))
        self._ends, self._counts = _grow_array(self._ends, most), _grow_array(self._counts, most)
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
        # upper bits of the hash choose the part: the same word is in the same part in every run
        parts[(used & NUMBER_MASK).astype(np.int64) - 1] = used >> np.uint64(2 * int(NUMBER_BITS) - PART_BITS)
        return (self._text[: self.text_bytes()], self._ends[: self._size], self._counts[: self._size], parts)

    def clear(self) -> None:
        """Forget all words."""
        # the other arrays keep their memory; a size of 0 says that nothing in them counts
        self._slots[:] = 0
        self._size = 0


def _grow_array(array: NDArray[Number], size: int) -> NDArray[Number]:
    """Return an array with room for `size`, and what is in it."""
    if size <= len(array):
        return array
    # by half: growth by what is asked for alone would copy the array again for each text
    grown = np.empty(max(size, len(array) + len(array) // 2), array.dtype)
    grown[: len(array)] = array
    return grown


@dataclass(frozen=True)
class WordTable:
    """Distinct words, the most frequent first."""

    raw: NDArray[np.uint8]
    """UTF-8 bytes of all words, one after another."""
    lengths_bytes: NDArray[np.int64]
    """Bytes of each word, [words]."""
    counts: NDArray[np.int64]
    """How often each stands in the text, falling, [words]."""
    min_count: int
    """Words that occur less often were left out for want of memory; 1: none."""
    dropped_words: int
    """How many those were."""
    dropped_share: float
    """Share of the text, by bytes, that they were."""

    def words(self) -> Iterator[bytes]:
        """Yield the words."""
        raw, start = self.raw.tobytes(), 0
        for length in self.lengths_bytes.tolist():
            yield raw[start : start + length]
            start += length
