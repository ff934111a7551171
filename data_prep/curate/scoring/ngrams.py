"""Hashed n-gram features for linear scorers (feature hashing: Weinberger et al., arXiv 0902.2206).

Lower-case text is split into units: runs of letters, marks and digits in scripts with spaces between words;
single characters in Han, kana, Hangul, Thai and similar scripts; single signs. An n-gram is n units joined by
spaces. Buckets equal scikit-learn's `HashingVectorizer(analyzer="word", token_pattern=r"\\S+",
alternate_sign=False)`: the absolute value of MurmurHash3 (32 bits, seed 0, signed) modulo the number of
buckets. Values equal `TfidfTransformer(use_idf=False, sublinear_tf=True)`: 1 + ln(count), rows scaled to
length 1. Without a vocabulary, memory does not grow with the data.
"""

import math
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from megatron_sov.base.documents.compiled import jit_compile
from megatron_sov.base.documents.scripts import SCORER_SCRIPTS, list_code_points
from megatron_sov.base.settings import require_that

SEPARATOR, LETTER, SINGLE = 0, 1, 2
"""Character classes: between units, part of a run, unit by itself."""
_LAST_ASSIGNED = 0x20000
_MASK = np.uint64(0xFFFFFFFF)
_C1, _C2, _M5, _E6 = np.uint64(0xCC9E2D51), np.uint64(0x1B873593), np.uint64(5), np.uint64(0xE6546B64)
_F1, _F2 = np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)


@dataclass(frozen=True)
class NgramSettings:
    """Settings for `Ngrams`."""

    num_buckets: Annotated[int, Ge(1 << 8), Le(1 << 26), require_that(
        lambda number: number.bit_count() == 1, "must be a power of two", f"e.g. {1 << 18}")] = 1 << 18
    """Hash buckets for n-grams; a power of two."""
    max_ngram: Annotated[int, Ge(1), Le(5)] = 2
    """Units in the longest n-gram."""
    max_chars: Annotated[int, Ge(1), Le(1 << 24)] = 20_000
    """Characters to read from the start of a text."""


class Ngrams:
    """Converts texts to rows of bucket values; not safe to share between threads."""

    def __init__(self, settings: NgramSettings) -> None:
        self.settings = settings
        # Shared by all texts: only touched buckets are cleared after each text.
        self._counts = np.zeros(settings.num_buckets, np.int32)
        self._classes = build_character_classes()

    def compute_row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return touched buckets (int32, ascending) and their values (float32), both [num_touched]."""
        touched = np.sort(self._count_text(text))
        counts = self._counts[touched]
        self._counts[touched] = 0
        # Sublinear: ten occurrences weigh about three times as much as a single occurrence.
        values = 1.0 + np.log(counts)
        return touched, (values / math.sqrt(float(values @ values) or 1.0)).astype(np.float32)

    def compute_dot(self, text: str, weights: np.ndarray) -> float:
        """Return the product of the text's row and `weights` (float32 [num_buckets])."""
        return float(_compute_dot(self._count_text(text), self._counts, weights))

    def _split_text(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        lowered = text[: self.settings.max_chars].lower()
        codes = np.frombuffer(lowered.encode("utf-32-le", "replace"), np.uint32)
        # At most four UTF-8 bytes and a space per character.
        buffer = np.empty(5 * len(codes), np.uint8)
        starts, ends = np.empty(len(codes), np.int64), np.empty(len(codes), np.int64)
        return buffer, starts, ends, int(_split_units(codes, self._classes, buffer, starts, ends))

    def _count_text(self, text: str) -> np.ndarray:
        """Add the text's n-grams to `_counts` and return the touched buckets; the caller clears them."""
        buffer, starts, ends, num_units = self._split_text(text)
        touched = np.empty(num_units * self.settings.max_ngram, np.int32)
        num_touched = _count_ngrams(buffer, starts, ends, num_units, self.settings.max_ngram,
                                    self.settings.num_buckets, self._counts, touched)
        return touched[:num_touched]


@lru_cache(maxsize=1)
def build_character_classes() -> np.ndarray:
    """Return the class of every code point, uint8 [0x110000], by Unicode category and block."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(_LAST_ASSIGNED):
        category = unicodedata.category(chr(code))
        if category[0] in "LMN" or category in ("Pc", "Cf"):
            table[code] = LETTER
        elif category[0] in "PS" or category == "Co":
            table[code] = SINGLE
    # Hangul words are separated by spaces but carry many endings: syllable n-grams generalize better.
    for begin, end in list_code_points(SCORER_SCRIPTS):
        block = table[begin:end]
        block[block == LETTER] = SINGLE
    table[_LAST_ASSIGNED : 0x40000] = SINGLE
    return table


@jit_compile
def _split_units(codes: np.ndarray, table: np.ndarray, buffer: np.ndarray, starts: np.ndarray,
                 ends: np.ndarray) -> int:
    """Write units to `buffer` in UTF-8, separated by spaces, and return their number."""
    size, num_units, before = 0, 0, 0
    for code in codes:
        kind = table[code]
        # A new unit begins: a single character, or the first character in a run.
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
        # Encode by hand, because numba has no byte strings; scikit-learn hashes the same UTF-8 bytes.
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
def _mix_word(word: np.uint64) -> np.uint64:
    """Mix four bytes for MurmurHash3."""
    word = (word * _C1) & _MASK
    word = ((word << np.uint64(15)) | (word >> np.uint64(17))) & _MASK
    return (word * _C2) & _MASK


@jit_compile
def _add_word(hashed: np.uint64, buffer: np.ndarray, i: int) -> np.uint64:
    word = (np.uint64(buffer[i]) | (np.uint64(buffer[i + 1]) << np.uint64(8))
            | (np.uint64(buffer[i + 2]) << np.uint64(16)) | (np.uint64(buffer[i + 3]) << np.uint64(24)))
    hashed ^= _mix_word(word)
    hashed = ((hashed << np.uint64(13)) | (hashed >> np.uint64(19))) & _MASK
    return (hashed * _M5 + _E6) & _MASK


@jit_compile
def _finish_hash(hashed: np.uint64, buffer: np.ndarray, i: int, start: int, end: int) -> np.uint64:
    """Return the hash for bytes `start` to `end`; `hashed` includes the bytes before `i`."""
    if i < end:
        word = np.uint64(0)
        # The last 1 to 3 bytes, little-endian.
        for j in range(end - 1, i - 1, -1):
            word = (word << np.uint64(8)) | np.uint64(buffer[j])
        hashed ^= _mix_word(word)
    hashed ^= np.uint64(end - start)
    hashed ^= hashed >> np.uint64(16)
    hashed = (hashed * _F1) & _MASK
    hashed ^= hashed >> np.uint64(13)
    hashed = (hashed * _F2) & _MASK
    return hashed ^ (hashed >> np.uint64(16))


@jit_compile
def _count_ngrams(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray, num_units: int, max_ngram: int,
                  num_buckets: int, counts: np.ndarray, touched: np.ndarray) -> int:
    """Count n-grams by bucket from MurmurHash3_x86_32, seed 0 (Appleby, public domain).

    Returns:
        Number of distinct buckets written to `touched`.
    """
    num_touched = 0
    for first in range(num_units):
        body, i = np.uint64(0), starts[first]
        # A longer n-gram continues the hash of the shorter n-gram, before its tail.
        for last in range(first, min(first + max_ngram, num_units)):
            while i + 4 <= ends[last]:
                body = _add_word(body, buffer, i)
                i += 4
            hashed = np.int64(_finish_hash(body, buffer, i, starts[first], ends[last]))
            # Absolute value of the signed hash, as in scikit-learn.
            if hashed >= 0x80000000:
                hashed = 0x100000000 - hashed
            bucket = hashed & (num_buckets - 1)
            if counts[bucket] == 0:
                touched[num_touched] = bucket
                num_touched += 1
            counts[bucket] += 1
    return num_touched


@jit_compile
def _compute_dot(touched: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> float:
    """Return the product of the row, scaled to length 1, and `weights`; clear `counts`."""
    total, squares = 0.0, 0.0
    for bucket in touched:
        value = 1.0 + math.log(counts[bucket])
        total += value * weights[bucket]
        squares += value * value
        counts[bucket] = 0
    return total / math.sqrt(squares) if squares > 0.0 else 0.0
