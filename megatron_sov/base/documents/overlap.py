"""Find text shared by two documents: runs of ten words, ignoring punctuation, case and markup.

The method follows VibeThinker's decontamination (arXiv 2511.06221, section 2.6). Scripts without blanks
between words have no countable words without a dictionary, so a character counts as a quarter of a word (a
run has forty characters). Korean writers use blanks differently and attach particles to words, so a syllable
counts as a third of a word. Both fractions are our choice.

A polynomial hash modulo 2^64 (Karp and Rabin, 1987) identifies each run of words and window of token ids.
"""

import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

RUN_WORDS = 10
"""Run length in words."""
TWELFTHS = 12
"""Twelfths per word: in this unit a quarter and a third of a word are whole numbers (3 and 4)."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Base of the polynomial: 2^64 divided by the golden ratio, an odd number."""
# an odd number has an inverse modulo 2^64, which allows shifting prefix sums to any position
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_SHIFT = np.uint64(29)
"""Mixes high bits into the low bits of a hash, which depend on the low bits of the ids alone."""
_MAX_CACHED_POWERS = 1 << 20
_HAS_IGNORED, _HAS_LONG_FOLDS = 1, 2
"""Bits that `unit_scan.fold_case` returns."""


@dataclass(frozen=True)
class Units:
    """Units of a text: words, or characters in scripts without blanks. Arrays have one entry per unit."""

    folded: str
    """The text that `span` indexes: an ASCII text as given, another in NFKC. Its case is folded only if that
    changes the length (ß -> ss)."""
    visible: NDArray[np.int64] | None
    """[visible characters]: index in `folded` of each visible character; None: all are visible."""
    hashes: NDArray[np.uint64]
    """64-bit hashes."""
    sizes: NDArray[np.uint8]
    """Unit sizes in twelfths of a word."""
    begins: NDArray[np.int64]
    """First index among the visible characters."""
    ends: NDArray[np.int64]
    """End index (exclusive) among the visible characters."""

    @cached_property
    def size(self) -> int:
        """Return the total size in twelfths of a word."""
        return int(self.sizes.sum(dtype=np.int64))

    def run_ends(self, words: int = RUN_WORDS) -> NDArray[np.int64]:
        """Return the end (exclusive) per run of `words` words; run i begins at unit i. Empty if too short."""
        from megatron_sov.base.documents import unit_scan  # not at the top, as in `find_units`

        ends = np.empty(len(self.sizes), np.int64)  # room for a run per unit
        num_runs = unit_scan.find_run_ends(self.sizes, words * TWELFTHS, ends)
        return ends[:num_runs]

    def runs(self, words: int = RUN_WORDS) -> NDArray[np.uint64]:
        """Return a hash per run of `words` words, uint64 [runs]; run i begins at unit i."""
        ends = self.run_ends(words)
        return hash_stretches(self.hashes, np.arange(len(ends)), ends)

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range in `folded` that units `begin` to `end` (exclusive) cover."""
        start, stop = int(self.begins[begin]), int(self.ends[end - 1])
        if self.visible is None:
            return start, stop
        return int(self.visible[start]), int(self.visible[stop - 1]) + 1


def fold_text(text: str) -> str:
    """Fold a text to lower case and NFKC."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    # again NFKC: a letter that case folding split may combine with the next character
    return unicodedata.normalize("NFKC", folded)


def find_units(text: str) -> Units:
    """Split a text into units.

    Ignores punctuation, symbols, tags, entities, TeX commands of formatting, hyphenation at line ends,
    thousands separators and invisible characters.
    """
    # not at the top: numba is slow to import, and `--help` compares no texts
    from megatron_sov.base.documents import unit_scan

    visible = None
    if text.isascii():  # most code and English text; needs neither NFKC nor the table of folds
        folded = text
        codes = np.frombuffer(text.lower().encode("ascii"), np.uint8).astype(np.uint32)
    else:
        folded = unicodedata.normalize("NFKC", text)
        codes = unit_scan.to_code_points(folded)
        fold_flags = unit_scan.fold_case(codes, unit_scan.get_folds(), unit_scan.get_classes())
        # a letter that folds to several letters (ß) changes indices: fold the text itself
        if fold_flags & _HAS_LONG_FOLDS:
            folded = fold_text(text)
            codes = unit_scan.to_code_points(folded)
        if fold_flags & _HAS_IGNORED:
            # remove invisible characters first, because such a character must not split a word
            visible = np.flatnonzero(unit_scan.get_classes()[codes] != unit_scan.IGNORED)
            codes = codes[visible]
    # `scan_units` fills these arrays, which have room for a unit per character
    room = len(codes)
    hashes, sizes = np.empty(room, np.uint64), np.empty(room, np.uint8)
    begins, ends = np.empty(room, np.int64), np.empty(room, np.int64)
    count = unit_scan.scan_units(codes, unit_scan.get_classes(), unit_scan.hash_commands(), hashes, sizes,
                                 begins, ends)
    return Units(folded, visible, hashes[:count], sizes[:count], begins[:count], ends[:count])


def hash_runs(text: str, words: int = RUN_WORDS) -> list[int]:
    """Return a 64-bit hash per run of `words` words; empty if the text is shorter."""
    hashes: list[int] = find_units(text).runs(words).tolist()
    return hashes


def hash_stretches(ids: NDArray[np.uint64], begins: NDArray[np.int64], ends: NDArray[np.int64]
                   ) -> NDArray[np.uint64]:
    """Return a hash per non-empty stretch `ids[begin:end]`, uint64 [stretches].

    With prefix sums ``S`` of ``ids[k] B^-k`` modulo 2^64, the polynomial of a stretch is
    ``B^(end-1) (S[end] - S[begin])``: the cost does not depend on the stretch's length.
    """
    powers, inverses = _get_powers(len(ids))
    sums = np.zeros(len(ids) + 1, np.uint64)
    # uint64 wraps around, which is the modulus
    np.cumsum(ids * inverses, out=sums[1:])
    hashes: NDArray[np.uint64] = powers[ends - 1] * (sums[ends] - sums[begins])
    return hashes ^ (hashes >> _SHIFT)


def _get_powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return at least `count` powers of `_BASE` and of `_INVERSE`."""
    if count > _MAX_CACHED_POWERS:
        return _compute_powers(count)
    # round up to a power of two: texts of all lengths share nine tables, of 2^12 to 2^20 powers
    powers, inverses = _get_cached_powers(max(1 << 12, 1 << (count - 1).bit_length()))
    return powers[:count], inverses[:count]


def _compute_powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    tables = []
    for base in (_BASE, _INVERSE):
        factors = np.full(count, base)
        factors[0] = 1
        tables.append(np.multiply.accumulate(factors))
    return tables[0], tables[1]


_get_cached_powers = lru_cache(maxsize=9)(_compute_powers)
