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

from megatron_sov.compiled import compiled
from megatron_sov.documents.unspaced import HANGUL_OF_RUNS, OF_RUNS, code_points

# The compiled loops of `overlap`: folded text into units, units into runs.

SEPARATOR, WORD, QUARTER, THIRD, IGNORED, DIGIT = 0, 1, 2, 3, 4, 16
"""What a character is: it parts words, belongs to one, is a unit by itself that counts a quarter or a third
of a word, is passed over, or is the digit `class - DIGIT`."""
MANY = np.uint32(0xFFFFFFFF)
WORD_SIZE, QUARTER_SIZE, THIRD_SIZE = 12, 3, 4
"""Sizes of units, in twelfths of a word."""
_TAG_CHARACTERS, _NAME_CHARACTERS = 400, 12
"""Longest tag, and longest name of an entity or of a command."""
_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(33)
_COMMA, _STOP, _QUOTE, _LOW_LINE, _BLANK, _HYPHEN = 0x2C, 0x2E, 0x27, 0x5F, 0x20, 0x2D
_LESS, _MORE, _AND, _SEMICOLON, _BACKSLASH, _SLASH, _MARK, _NUMBER = (
    0x3C, 0x3E, 0x26, 0x3B, 0x5C, 0x2F, 0x21, 0x23)
_APOSTROPHE, _ARABIC_THOUSANDS = 0x2019, 0x066C
_NEW_LINE, _RETURN, _TAB = 0x0A, 0x0D, 0x09


@compiled
def fold_case(codes: NDArray[np.uint32], folds: NDArray[np.uint32], classes: NDArray[np.uint8]) -> int:
    """Bring code points into one case where they stand.

    Args:
        codes: to change.
        folds: the code point in one case of each; `MANY` where it is more than one.
        classes: of all code points.

    Returns:
        1: some are of class `IGNORED`; 2: some become more than one, and these are left; 3: both.
    """
    found = 0
    for i in range(len(codes)):
        fold = folds[codes[i]]
        if fold == MANY:
            found |= 2
        else:
            codes[i] = fold
        if classes[codes[i]] == IGNORED:
            found |= 1
    return found


@compiled
def scan(codes: NDArray[np.uint32], classes: NDArray[np.uint8], commands: NDArray[np.uint64],
         hashes: NDArray[np.uint64], sizes: NDArray[np.uint8], begins: NDArray[np.int64],
         ends: NDArray[np.int64]) -> int:
    """Find the units of a folded text.

    Args:
        codes: its code points, none of class `IGNORED`.
        classes: of all code points.
        commands: `word_hash` of the TeX commands that are markup, sorted.
        hashes: receives 64 bits of each unit; room for one per code point, here and below.
        sizes: receives the size of each, in twelfths of a word.
        begins: receives where each begins in `codes`.
        ends: receives where each ends.

    Returns:
        How many units there are.
    """
    count, at, begin, end, group, num_groups = 0, 0, 0, 0, 0, 0
    is_open = is_number = False
    value = _OFFSET
    while at < len(codes):
        code = np.int64(codes[at])
        kind = np.int64(classes[code])
        if kind == WORD or kind >= DIGIT:
            if not is_open:
                is_open = is_number = True
                begin, group, num_groups, value = at, 0, 0, _OFFSET
            if kind >= DIGIT:
                code = 48 + kind - DIGIT
                group += 1
            else:
                is_number = False
            value = (value ^ np.uint64(code)) * _PRIME
            at += 1
            end = at
            continue
        if is_open and kind == SEPARATOR:
            if is_number and _parts_thousands(codes, classes, at, group, num_groups):
                at, group, num_groups = at + 1, 0, num_groups + 1
                continue
            behind = 0 if is_number else _behind_hyphen(codes, classes, at)
            if behind:
                at = behind
                continue
        if is_open:
            hashes[count], sizes[count], begins[count], ends[count] = _mixed(value), WORD_SIZE, begin, end
            count += 1
            is_open = False
        if kind == SEPARATOR:
            at = _behind_markup(codes, classes, commands, at)
            continue
        hashes[count] = _mixed((_OFFSET ^ np.uint64(code)) * _PRIME)
        sizes[count] = QUARTER_SIZE if kind == QUARTER else THIRD_SIZE
        begins[count], ends[count] = at, at + 1
        count += 1
        at += 1
    if is_open:
        hashes[count], sizes[count], begins[count], ends[count] = _mixed(value), WORD_SIZE, begin, end
        count += 1
    return count


@compiled
def word_hash(codes: NDArray[np.uint32]) -> np.uint64:
    """Return 64 bits of a word, as `scan` does."""
    value = _OFFSET
    for code in codes:
        value = (value ^ np.uint64(code)) * _PRIME
    return _mixed(value)


@compiled
def _mixed(value: np.uint64) -> np.uint64:
    """Spread what tells words apart over all bits (the end of MurmurHash3)."""
    value = (value ^ (value >> _HALF)) * _MIX_1
    value = (value ^ (value >> _HALF)) * _MIX_2
    return value ^ (value >> _HALF)


@compiled
def _parts_thousands(codes: NDArray[np.uint32], classes: NDArray[np.uint8], at: int, group: int,
                     num_groups: int) -> bool:
    """Return whether a sign between digits parts thousands: 1,000 and 1 000 are 1000."""
    code = codes[at]
    if code not in (_COMMA, _STOP, _QUOTE, _LOW_LINE, _BLANK, _APOSTROPHE, _ARABIC_THOUSANDS):
        return False
    if not (group == 3 or (num_groups == 0 and 1 <= group < 3)) or at + 3 >= len(codes):
        return False
    for place in range(at + 1, at + 4):
        if classes[codes[place]] < DIGIT:
            return False
    return at + 4 == len(codes) or bool(classes[codes[at + 4]] < DIGIT)


@compiled
def _behind_hyphen(codes: NDArray[np.uint32], classes: NDArray[np.uint8], at: int) -> int:
    """Return where a word goes on that a hyphen and one line's end part; 0: none does."""
    if codes[at] != _HYPHEN and codes[at] != 0x2010:
        return 0
    at += 1
    num_lines = 0
    while at < len(codes) and (codes[at] == _BLANK or codes[at] == _TAB or codes[at] == _RETURN
                               or codes[at] == _NEW_LINE):
        if codes[at] == _NEW_LINE:
            num_lines += 1
        at += 1
    return at if num_lines == 1 and at < len(codes) and classes[codes[at]] == WORD else 0


@compiled
def _behind_markup(codes: NDArray[np.uint32], classes: NDArray[np.uint8], commands: NDArray[np.uint64],
                   at: int) -> int:
    """Return where text goes on behind a sign, and behind the tag, the entity or the formatting command that
    it begins."""
    code, after = codes[at], at + 1
    if after == len(codes):
        return after
    if code == _LESS:
        first = codes[after]
        if 0x61 <= first <= 0x7A or first in (_SLASH, _MARK):
            for place in range(after + 1, min(after + _TAG_CHARACTERS, len(codes))):
                if codes[place] == _MORE:
                    return place + 1
                if codes[place] == _LESS:
                    return after
    elif code == _AND:
        place = after
        while (place < min(after + _NAME_CHARACTERS, len(codes))
               and (codes[place] == _NUMBER or 0x30 <= codes[place] <= 0x39 or 0x61 <= codes[place] <= 0x7A)):
            place += 1
        if after < place < len(codes) and codes[place] == _SEMICOLON:
            return place + 1
    elif code == _BACKSLASH:
        place = after
        while place < len(codes) and 0x61 <= codes[place] <= 0x7A and place <= after + _NAME_CHARACTERS:
            place += 1
        if place > after:
            name = word_hash(codes[after:place])
            found = np.searchsorted(commands, name)
            if found < len(commands) and commands[found] == name:
                return place
    return after


@compiled
def run_ends(sizes: NDArray[np.uint8], target: int, ends: NDArray[np.int64]) -> int:
    """Find the runs of units that reach a size, one from each unit on.

    Args:
        sizes: of the units.
        target: of a run, in the same measure; a run is the shortest that reaches it.
        ends: receives the unit behind the run of each beginning; room for one per unit.

    Returns:
        How many units begin one: all up to where too little is left.
    """
    held, end = np.int64(0), 0
    for begin in range(len(sizes)):
        while held < target:
            if end == len(sizes):
                return begin
            held += np.int64(sizes[end])
            end += 1
        ends[begin] = end
        held -= np.int64(sizes[begin])
    return len(sizes)


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
        found = np.empty(len(self.sizes), np.int64)
        return found[:run_ends(self.sizes, words * TWELFTHS, found)]

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
    places = None
    if text.isascii():
        folded = text
        codes = np.frombuffer(text.lower().encode("ascii"), np.uint8).astype(np.uint32)
    else:
        folded = unicodedata.normalize("NFKC", text)
        codes = _code_points(folded)
        found = fold_case(codes, _folds(), _classes())
        if found & 2:
            folded = fold(text)
            codes = _code_points(folded)
        if found & 1:
            places = np.flatnonzero(_classes()[codes] != IGNORED)
            codes = codes[places]
    count = len(codes)
    hashes, sizes = np.empty(count, np.uint64), np.empty(count, np.uint8)
    begins, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    count = scan(codes, _classes(), _commands(), hashes, sizes, begins, ends)
    return Units(folded, places, hashes[:count], sizes[:count], begins[:count], ends[:count])


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(bytearray(text.encode("utf-32-le", errors="surrogatepass")), np.uint32)


def units(text: str) -> list[str]:
    """Return the units of a text as strings, without what is passed over."""
    found = find_units(text)
    spans = (found.span(i, i + 1) for i in range(len(found.hashes)))
    return ["".join(c for c in found.folded[start:stop].casefold()
                    if _classes()[ord(c)] not in (SEPARATOR, IGNORED))
            for start, stop in spans]


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
    powers, inverses = _powers(len(ids))
    sums = np.zeros(len(ids) + 1, np.uint64)
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
    return stretch_hashes(tokens.astype(np.uint64) + np.uint64(1), begins, begins + window)


def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the first powers of the base and of its inverse, at least so many of each."""
    if count > _KEPT_POWERS:
        return _first_powers(count)
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
    found = np.full(0x110000, WORD, np.uint8)
    for begin, end in code_points(OF_RUNS):
        found[begin:end] = QUARTER
    for begin, end in code_points(HANGUL_OF_RUNS):
        found[begin:end] = THIRD
    for code in range(_NAMED_PLANES):
        category = unicodedata.category(chr(code))
        if category[0] in "PSZ" or category == "Cc":
            found[code] = SEPARATOR
        elif category == "Cf":
            found[code] = IGNORED
        elif category == "Nd":
            found[code] = DIGIT + unicodedata.digit(chr(code))
    for begin, end in _INVISIBLE:
        found[begin:end] = IGNORED
    return found


@lru_cache(maxsize=1)
def _folds() -> NDArray[np.uint32]:
    """Return each code point in one case; `unit_scan.MANY` where that is more than one."""
    found = np.arange(0x110000, dtype=np.uint32)
    for code in range(_NAMED_PLANES):
        if (fold := chr(code).casefold()) != chr(code):
            found[code] = ord(fold) if len(fold) == 1 else MANY
    return found


@lru_cache(maxsize=1)
def _commands() -> NDArray[np.uint64]:
    return np.sort(np.array([word_hash(_code_points(name)) for name in _COMMANDS], np.uint64))
