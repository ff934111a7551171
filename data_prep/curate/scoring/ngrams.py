"""Hashed n-grams of a text: what the linear scorers look at.

A text is cut into units: runs of letters, marks and digits in scripts with spaces between words; single
characters in Han, kana, Hangul, Thai and their neighbours; each sign for itself.  Everything is in lower
case.  An n-gram is n units joined by spaces, and its bucket is that of scikit-learn's
`HashingVectorizer(analyzer="word", token_pattern=r"\\S+", alternate_sign=False)`: MurmurHash3 (32 bits, seed
0, signed), its absolute value modulo the number of buckets.  A bucket's value is 1 + ln(count), and a row has
length 1, as `TfidfTransformer(use_idf=False, sublinear_tf=True)` gives it.  No list of words is kept, so
nothing grows with the data (feature hashing: Weinberger et al., arXiv 0902.2206).
"""

from __future__ import annotations

import math
import unicodedata
from functools import lru_cache

import numpy as np

from data_prep.curate.scoring.ngram_settings import NgramSettings
from megatron_sov.base.documents.compiled import jit_compile
from megatron_sov.base.documents.scripts import SCORER_SCRIPTS, list_code_points

SEPARATOR, LETTER, SINGLE = 0, 1, 2
"""What a character is: between units, part of a run, or a unit by itself."""
_LAST_ASSIGNED = 0x20000
_MASK = np.uint64(0xFFFFFFFF)
_C1, _C2, _M5, _E6 = np.uint64(0xCC9E2D51), np.uint64(0x1B873593), np.uint64(5), np.uint64(0xE6546B64)
_F1, _F2 = np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)


class Ngrams:
    """Turns texts into rows of bucket values; not to be shared by threads."""

    def __init__(self, settings: NgramSettings) -> None:
        self.settings = settings
        # One array for all texts: only the buckets that a text touched are cleared behind it.
        self._counts = np.zeros(settings.num_buckets, np.int32)
        self._classes = build_character_classes()

    def units(self, text: str) -> list[str]:
        buffer, starts, ends, num_units = self._split(text)
        raw = buffer[: ends[num_units - 1]].tobytes() if num_units else b""
        return [raw[starts[i]:ends[i]].decode() for i in range(num_units)]

    def counts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the buckets that a text touches, rising, and how often (int32, int32)."""
        touched = np.sort(self._touch(text))
        counts = self._counts[touched]
        self._counts[touched] = 0
        return touched, counts

    def row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the buckets that a text touches, rising (int32), and their values (float32)."""
        touched, counts = self.counts(text)
        # Sublinear: a word ten times counts about three times as much as once.
        values = 1.0 + np.log(counts)
        return touched, (values / math.sqrt(float(values @ values) or 1.0)).astype(np.float32)

    def dot(self, text: str, weights: np.ndarray) -> float:
        """Return the product of a text's row with weights (float32, one for each bucket)."""
        return float(_dot(self._touch(text), self._counts, weights))

    def _split(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        lowered = text[: self.settings.max_chars].lower()
        codes = np.frombuffer(lowered.encode("utf-32-le", "replace"), np.uint32)
        # At most four bytes of UTF-8 and one space for each character.
        buffer = np.empty(5 * len(codes), np.uint8)
        starts, ends = np.empty(len(codes), np.int64), np.empty(len(codes), np.int64)
        return buffer, starts, ends, int(_split(codes, self._classes, buffer, starts, ends))

    def _touch(self, text: str) -> np.ndarray:
        """Count a text's n-grams; returns the buckets to look at, and to clear."""
        buffer, starts, ends, num_units = self._split(text)
        touched = np.empty(num_units * self.settings.max_ngram, np.int32)
        num_touched = _count(buffer, starts, ends, num_units, self.settings.max_ngram,
                             self.settings.num_buckets, self._counts, touched)
        return touched[:num_touched]


@lru_cache(maxsize=1)
def build_character_classes() -> np.ndarray:
    """Return what each code point is (uint8), by its category and block in Unicode."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(_LAST_ASSIGNED):
        category = unicodedata.category(chr(code))
        if category[0] in "LMN" or category in ("Pc", "Cf"):
            table[code] = LETTER
        elif category[0] in "PS" or category == "Co":
            table[code] = SINGLE
    # Hangul has blanks, but its words carry so many endings that syllables in a row tell more of what is new
    for begin, end in list_code_points(SCORER_SCRIPTS):
        block = table[begin:end]
        block[block == LETTER] = SINGLE
    table[_LAST_ASSIGNED : 0x40000] = SINGLE
    return table


@jit_compile
def _split(codes: np.ndarray, table: np.ndarray, buffer: np.ndarray, starts: np.ndarray,
           ends: np.ndarray) -> int:
    """Write the units in UTF-8 with a space between them; returns how many there are."""
    size, num_units, before = 0, 0, 0
    for code in codes:
        kind = table[code]
        # A new unit begins: a sign or character by itself, or the first of a run.
        if kind != 0 and (kind == 2 or before != 1):
            if num_units > 0:
                ends[num_units - 1] = size
                buffer[size] = 32
                size += 1
            starts[num_units] = size
            num_units += 1
        before = kind
        if kind == 0:
            continue
        # UTF-8 by hand, since numba has no strings of bytes; scikit-learn hashes the same bytes.
        if code < 0x80:
            buffer[size] = code
            size += 1
            continue
        if code < 0x800:
            buffer[size] = 0xC0 | (code >> 6)
        elif code < 0x10000:
            buffer[size] = 0xE0 | (code >> 12)
            size += 1
            buffer[size] = 0x80 | ((code >> 6) & 0x3F)
        else:
            buffer[size] = 0xF0 | (code >> 18)
            buffer[size + 1] = 0x80 | ((code >> 12) & 0x3F)
            size += 2
            buffer[size] = 0x80 | ((code >> 6) & 0x3F)
        buffer[size + 1] = 0x80 | (code & 0x3F)
        size += 2
    if num_units > 0:
        ends[num_units - 1] = size
    return num_units


@jit_compile
def _mixed(word: np.uint64) -> np.uint64:
    """Return four bytes as MurmurHash3 mixes them before they enter the hash."""
    word = (word * _C1) & _MASK
    word = ((word << np.uint64(15)) | (word >> np.uint64(17))) & _MASK
    return (word * _C2) & _MASK


@jit_compile
def _entered(hashed: np.uint64, buffer: np.ndarray, i: int) -> np.uint64:
    word = (np.uint64(buffer[i]) | (np.uint64(buffer[i + 1]) << np.uint64(8))
            | (np.uint64(buffer[i + 2]) << np.uint64(16)) | (np.uint64(buffer[i + 3]) << np.uint64(24)))
    hashed ^= _mixed(word)
    hashed = ((hashed << np.uint64(13)) | (hashed >> np.uint64(19))) & _MASK
    return (hashed * _M5 + _E6) & _MASK


@jit_compile
def _finished(hashed: np.uint64, buffer: np.ndarray, i: int, start: int, end: int) -> np.uint64:
    """Return the hash of the bytes from `start` to `end`, of which those before `i` have entered it."""
    if i < end:
        word = np.uint64(0)
        # The last one to three bytes, little-endian.
        for j in range(end - 1, i - 1, -1):
            word = (word << np.uint64(8)) | np.uint64(buffer[j])
        hashed ^= _mixed(word)
    hashed ^= np.uint64(end - start)
    hashed ^= hashed >> np.uint64(16)
    hashed = (hashed * _F1) & _MASK
    hashed ^= hashed >> np.uint64(13)
    hashed = (hashed * _F2) & _MASK
    return hashed ^ (hashed >> np.uint64(16))


@jit_compile
def _count(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray, num_units: int, max_ngram: int,
           num_buckets: int, counts: np.ndarray, touched: np.ndarray) -> int:
    """Count n-grams by bucket of their MurmurHash3_x86_32, seed 0 (Appleby, public domain); returns how many
    buckets `touched` lists, each of them once.  N-grams of one beginning share its work."""
    num_touched = 0
    for first in range(num_units):
        body, i = np.uint64(0), starts[first]
        # The hash of a longer n-gram goes on from where that of the shorter one stood, before its tail.
        for last in range(first, min(first + max_ngram, num_units)):
            while i + 4 <= ends[last]:
                body = _entered(body, buffer, i)
                i += 4
            hashed = np.int64(_finished(body, buffer, i, starts[first], ends[last]))
            # The absolute value of the signed hash, as scikit-learn takes it.
            if hashed >= 0x80000000:
                hashed = 0x100000000 - hashed
            bucket = hashed & (num_buckets - 1)
            if counts[bucket] == 0:
                touched[num_touched] = bucket
                num_touched += 1
            counts[bucket] += 1
    return num_touched


@jit_compile
def _dot(touched: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> float:
    """Return the product of a row of length 1 with weights, and clear the counts."""
    total, squares = 0.0, 0.0
    for bucket in touched:
        value = 1.0 + math.log(counts[bucket])
        total += value * weights[bucket]
        squares += value * value
        counts[bucket] = 0
    return total / math.sqrt(squares) if squares > 0.0 else 0.0
