"""What one text shares with another: runs of ten words, with punctuation, case and markup left out.

As VibeThinker decontaminates (arXiv 2511.06221, section 2.6).  Scripts that put no blank between words have
no words to count without a dictionary: of them a character counts as a quarter of a word, so that a run is as
long as forty characters.  Korean has blanks, but writers differ in where they put them and hang particles on
words, so that of it a syllable counts as a third of a word.  Both parts of a word are our choice.

A run, and a window of token ids, is known by one polynomial hash modulo 2^64 (Karp and Rabin, 1987).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.scripts import HANGUL_OF_RUNS, OF_RUNS, code_points

WORDS = 10
"""Of a run."""
TWELFTHS = 12
"""Measure of a unit's size: a word has twelve."""
_INVISIBLE = ((0x034F, 0x0350), (0x115F, 0x1161), (0x17B4, 0x17B6), (0x180B, 0x1810), (0x3164, 0x3165),
              (0xFE00, 0xFE10), (0xFFA0, 0xFFA1), (0xE0000, 0xE1000))
"""What has no shape of its own (Default_Ignorable_Code_Point) beside the category Cf."""
_NAMED_PLANES = 0x30000
"""Code points whose category is looked up; what lies above is Han, invisible, or nobody's."""
_COMMANDS = ("text", "textbf", "textit", "textrm", "texttt", "textsf", "textsc", "emph", "mathrm", "mathbf",
             "mathit", "mathsf", "mathtt", "boldsymbol", "bm", "left", "right", "big", "bigl", "bigr",
             "displaystyle", "textstyle", "limits", "quad", "qquad", "underline")
"""Commands of TeX that change how something looks and not what it says."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
# an odd number has an inverse modulo 2^64, which is what lets sums be shifted to any stretch
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_FINISH = np.uint64(29)
_KEPT_POWERS = 1 << 20


@dataclass(frozen=True)
class Units:
    """The words of a text, or its characters where it has no blanks that could be relied upon."""

    folded: str
    """The text in Unicode's compatibility form (NFKC), in one case where that changes its length."""
    places: NDArray[np.int64] | None
    """Place in `folded` of each character that can be seen; None: all can."""
    hashes: NDArray[np.uint64]
    """64 bits of each unit."""
    sizes: NDArray[np.uint8]
    """Size of each, in twelfths of a word."""
    begins: NDArray[np.int64]
    """Where each begins, among the characters that can be seen."""
    ends: NDArray[np.int64]
    """Where each ends."""

    @cached_property
    def size(self) -> int:
        """Return the size of all together, in twelfths of a word."""
        return int(self.sizes.sum(dtype=np.int64))

    def run_ends(self, words: int = WORDS) -> NDArray[np.int64]:
        """Return the unit behind each run of so many words: the first run begins with the first unit, and so
        on; empty for a shorter text."""
        from megatron_sov.base.documents import unit_scan

        found = np.empty(len(self.sizes), np.int64)
        return found[:unit_scan.run_ends(self.sizes, words * TWELFTHS, found)]

    def runs(self, words: int = WORDS) -> NDArray[np.uint64]:
        """Return the hash of each run of so many words, one from each unit on."""
        ends = self.run_ends(words)
        return stretch_hashes(self.hashes, np.arange(len(ends)), ends)

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Return where units `begin` up to `end` stand in `folded`."""
        start, stop = int(self.begins[begin]), int(self.ends[end - 1])
        if self.places is None:
            return start, stop
        return int(self.places[start]), int(self.places[stop - 1]) + 1


def fold(text: str) -> str:
    """Return a text in one case and in Unicode's compatibility form."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded)  # a letter that became two may join what follows it


def find_units(text: str) -> Units:
    """Return the units of a text.

    Beside punctuation and symbols it passes over tags, entities, TeX commands that only format, the hyphen
    that parts a word at a line's end, what separates a number's thousands, and what cannot be seen.
    """
    from megatron_sov.base.documents import unit_scan

    places = None
    if text.isascii():
        folded = text
        # most texts of code and English: no tables, no normal form
        codes = np.frombuffer(text.lower().encode("ascii"), np.uint8).astype(np.uint32)
    else:
        folded = unicodedata.normalize("NFKC", text)
        codes = _code_points(folded)
        found = unit_scan.fold_case(codes, _folds(), _classes())
        # one letter that becomes two (as ß) changes the places, so the text itself is folded then
        if found & 2:
            folded = fold(text)
            codes = _code_points(folded)
        if found & 1:
            # invisible characters go before words are found: one inside a word must not part it
            places = np.flatnonzero(_classes()[codes] != unit_scan.IGNORED)
            codes = codes[places]
    count = len(codes)
    hashes, sizes = np.empty(count, np.uint64), np.empty(count, np.uint8)
    begins, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    # room for one unit a character, the most there can be; the rest is cut off below
    count = unit_scan.scan(codes, _classes(), _commands(), hashes, sizes, begins, ends)
    return Units(folded, places, hashes[:count], sizes[:count], begins[:count], ends[:count])


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(bytearray(text.encode("utf-32-le", errors="surrogatepass")), np.uint32)


def units(text: str) -> list[str]:
    """Return the units of a text as strings, without what is passed over."""
    from megatron_sov.base.documents import unit_scan

    found, classes, written = find_units(text), _classes(), list[str]()
    passed_over = (unit_scan.SEPARATOR, unit_scan.IGNORED)
    for i in range(len(found.hashes)):
        start, stop = found.span(i, i + 1)
        characters = found.folded[start:stop].casefold()
        written.append("".join(c for c in characters if classes[ord(c)] not in passed_over))
    return written


def runs(text: str, words: int = WORDS) -> list[int]:
    """Return 64 bits for each run of so many words, one from each unit on; nothing for a shorter text."""
    found: list[int] = find_units(text).runs(words).tolist()
    return found


def stretch_hashes(ids: NDArray[np.uint64], begins: NDArray[np.int64], ends: NDArray[np.int64]
                   ) -> NDArray[np.uint64]:
    """Return the hash of each stretch `ids[begin:end]`; none may be empty.

    With ``S`` the sums of ``ids[k] B^-k`` a stretch's polynomial is ``B^(end-1) (S[end] - S[begin])``, all
    modulo 2^64, where the odd `B` has an inverse: the cost does not depend on the stretches' lengths.
    """
    # Rabin's hash of every stretch from prefix sums: two lookups and a product each
    powers, inverses = _powers(len(ids))
    sums = np.zeros(len(ids) + 1, np.uint64)
    # unsigned numbers wrap around, which is the modulus
    np.cumsum(ids * inverses, out=sums[1:])
    found: NDArray[np.uint64] = powers[ends - 1] * (sums[ends] - sums[begins])
    return found ^ (found >> _FINISH)


def window_hashes(tokens: NDArray[Any], window: int) -> NDArray[np.uint64]:
    """Return the hash of the `window` tokens from each place on, [n - window + 1] uint64;
    empty for shorter texts."""
    count = len(tokens) - window + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    begins = np.arange(count)
    # plus one: id 0 would vanish in a sum, and windows of different lengths could agree
    return stretch_hashes(tokens.astype(np.uint64) + np.uint64(1), begins, begins + window)


def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the first powers of the base and of its inverse, at least so many of each."""
    if count > _KEPT_POWERS:
        return _first_powers(count)
    # a power of two, so that texts of all lengths share nine tables
    powers, inverses = _first_kept_powers(max(1 << 12, 1 << (count - 1).bit_length()))
    return powers[:count], inverses[:count]


def _first_powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    made = []
    for base in (_BASE, _INVERSE):
        factors = np.full(count, base)
        factors[:1] = 1
        made.append(np.multiply.accumulate(factors))
    return made[0], made[1]


_first_kept_powers = lru_cache(maxsize=9)(_first_powers)


@lru_cache(maxsize=1)
def _classes() -> NDArray[np.uint8]:
    """Return what each code point is, one of the classes of `unit_scan`."""
    from megatron_sov.base.documents import unit_scan as u

    found = np.full(0x110000, u.WORD, np.uint8)
    for begin, end in code_points(OF_RUNS):
        found[begin:end] = u.QUARTER
    for begin, end in code_points(HANGUL_OF_RUNS):
        found[begin:end] = u.THIRD
    # after the scripts: marks and digits inside their ranges are no letters
    for code in range(_NAMED_PLANES):
        category = unicodedata.category(chr(code))
        if category[0] in "PSZ" or category == "Cc":
            found[code] = u.SEPARATOR
        elif category == "Cf":
            found[code] = u.IGNORED
        elif category == "Nd":
            found[code] = u.DIGIT + unicodedata.digit(chr(code))
    for begin, end in _INVISIBLE:
        found[begin:end] = u.IGNORED
    return found


@lru_cache(maxsize=1)
def _folds() -> NDArray[np.uint32]:
    """Return each code point in one case; `unit_scan.MANY` where that is more than one."""
    from megatron_sov.base.documents import unit_scan

    found = np.arange(0x110000, dtype=np.uint32)
    for code in range(_NAMED_PLANES):
        if (fold := chr(code).casefold()) != chr(code):
            found[code] = ord(fold) if len(fold) == 1 else unit_scan.MANY
    return found


@lru_cache(maxsize=1)
def _commands() -> NDArray[np.uint64]:
    from megatron_sov.base.documents import unit_scan

    return np.sort(np.array([unit_scan.word_hash(_code_points(name)) for name in _COMMANDS], np.uint64))
