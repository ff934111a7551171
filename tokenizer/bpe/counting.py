"""Count words: compiled loops that split UTF-8 text and sum counts in a hash table.

The hash table uses open addressing.  A slot is 0 (empty), or a word's hash in the upper 32 bits and its
index + 1 in the lower 32 bits.
"""

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
Number = TypeVar("Number", bound=np.generic)
FIRST_SLOTS = 1 << 16
PART_BITS = 6
NUM_PARTS = 1 << PART_BITS
"""Parts into which words are divided by their hash."""


@jit_compile
def split_words(raw: NDArray[np.uint8], kinds: NDArray[np.uint8], steps: NDArray[np.int32],
                ends: NDArray[np.int32]) -> int:
    """Split UTF-8 text into the matches of an automaton and the text between matches.

    Args:
        raw: UTF-8 text.
        kinds: see `tokenizer.bpe.splitter.Automaton`.
        steps: see `tokenizer.bpe.splitter.Automaton`.
        ends: output, word ends in bytes; needs `len(raw)` elements.

    Returns:
        `num_words`.
    """
    # the last column stands for the end of the text, for lookaheads
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
            # a match ends here; a longer match may follow
            if step & 1:
                matched = place
            state = step >> 1
            if not state:
                break
            place += size
        # without a match the character belongs to the text between matches
        if matched < 0:
            at += _decode_code_point(raw, at)[1]
            continue
        if begin < at:
            ends[num_words] = at
            num_words += 1
        ends[num_words] = matched
        num_words += 1
        # patterns never match empty text, so the loop always advances
        begin = at = matched
    if begin < len(raw):
        ends[num_words] = len(raw)
        num_words += 1
    return num_words


@jit_compile
def _decode_code_point(raw: NDArray[np.uint8], place: int) -> tuple[np.int64, int]:
    """Return the code point at a byte offset and its length in bytes."""
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
    """Add the words in `raw` to the hash table.

    Args:
        raw: UTF-8 text.
        ends: word ends in `raw`.
        times: count to add per word.
        slots: hash table; its size is a power of two and at least `2 * num_words`.
        text: concatenated distinct words; needs room for `raw`.
        word_ends: ends in `text`; needs room for `len(ends)` more words.
        counts: counts by distinct word; needs room for `len(ends)` more words.
        num_words: distinct words before the call.

    Returns:
        The distinct words after the call.
    """
    mask, begin = np.uint64(len(slots) - 1), np.int64(0)
    for end in ends:
        hash_ = _FNV_OFFSET
        for i in range(begin, end):
            hash_ = (hash_ ^ np.uint64(raw[i])) * _FNV_PRIME
        # FNV's low bits are weak for short words; mix, then take the upper 32 bits
        hash_ = (hash_ ^ (hash_ >> NUMBER_BITS)) * _MIX >> NUMBER_BITS
        at = hash_ & mask
        while True:
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
            # compare the bytes too: 32-bit hashes collide among millions of words
            if slot >> NUMBER_BITS == hash_:
                word = np.int64(slot & NUMBER_MASK) - 1
                start = word_ends[word - 1] if word else 0
                if word_ends[word] - start == end - begin and _is_equal(raw, begin, text, start, end - begin):
                    counts[word] += times
                    break
            # linear probing; the table is at most half full
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
    """Copy `slots` into a larger, empty hash table."""
    mask = np.uint64(len(larger) - 1)
    for slot in slots:
        if slot:
            at = (slot >> NUMBER_BITS) & mask
            while larger[at]:
                at = (at + _ONE) & mask
            # the words of a table are distinct, so their bytes need no comparison
            larger[at] = slot


class WordCounter:
    """Hash table word -> count, in arrays that grow."""

    def __init__(self) -> None:
        self._slots: NDArray[np.uint64] = np.zeros(FIRST_SLOTS, np.uint64)
        self._text: NDArray[np.uint8] = np.empty(1 << 20, np.uint8)
        self._ends: NDArray[np.int64] = np.empty(FIRST_SLOTS, np.int64)
        self._counts: NDArray[np.int64] = np.empty(FIRST_SLOTS, np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add_text(self, raw: bytes, ends: NDArray[np.int32], times: int) -> None:
        """Add `times` to the counts in `raw`, whose words end at `ends`."""
        # the compiled loop cannot grow arrays, so make room for the case that every word is new
        max_words = self._size + len(ends)
        self._text = _grow_array(self._text, self.text_bytes + len(raw))
        self._ends, self._counts = _grow_array(self._ends, max_words), _grow_array(self._counts, max_words)
        if 2 * max_words > len(self._slots):
            larger = np.zeros(1 << (2 * max_words).bit_length(), np.uint64)
            move_slots(self._slots, larger)
            self._slots = larger
        self._size = add_words(np.frombuffer(raw, np.uint8), ends, times, self._slots, self._text, self._ends,
                               self._counts, self._size)

    @property
    def text_bytes(self) -> int:
        return int(self._ends[self._size - 1]) if self._size else 0

    def get_words(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return concatenated words, `word_ends`, `counts` and parts, [words]."""
        used = self._slots[self._slots != 0]
        parts = np.empty(self._size, np.int64)
        # upper hash bits select the part: a word has the same part in every run
        parts[(used & NUMBER_MASK).astype(np.int64) - 1] = used >> np.uint64(2 * int(NUMBER_BITS) - PART_BITS)
        return self._text[: self.text_bytes], self._ends[: self._size], self._counts[: self._size], parts

    def clear(self) -> None:
        self._slots[:] = 0
        self._size = 0


def _grow_array(array: NDArray[Number], size: int) -> NDArray[Number]:
    """Return the array itself if it has `size` elements, else a larger copy."""
    if size <= len(array):
        return array
    # by half at least, so that texts do not copy the array each time
    grown = np.empty(max(size, len(array) + len(array) // 2), array.dtype)
    grown[: len(array)] = array
    return grown


@dataclass(frozen=True)
class WordTable:
    """Distinct words by falling count."""

    raw: NDArray[np.uint8]
    """Concatenated words, UTF-8."""
    lengths_bytes: NDArray[np.int64]
    """[words]"""
    counts: NDArray[np.int64]
    """Falling, [words]."""
    min_count: int
    """Words below `min_count` were dropped to bound memory. 1: no word was dropped."""
    dropped_words: int
    dropped_share: float
    """Dropped bytes divided by text bytes."""

    def iter_words(self) -> Iterator[bytes]:
        raw, start = self.raw.tobytes(), 0
        for length in self.lengths_bytes.tolist():
            yield raw[start : start + length]
            start += length
