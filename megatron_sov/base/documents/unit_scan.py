"""The compiled loops of `overlap`: folded text into units, units into runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import compiled

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


# One pass with explicit state, which numba compiles to a loop without objects.  A word's hash is FNV-1a over
# its code points, in which the digits of all scripts count as ASCII's; what separates thousands leaves no
# trace in it, so that 1,000 and 1000 are one word.  A character of a script without blanks is a unit itself.
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
    # groups are of three digits; the first one may be shorter
    if not (group == 3 or (num_groups == 0 and 1 <= group < 3)) or at + 3 >= len(codes):
        return False
    for place in range(at + 1, at + 4):
        if classes[codes[place]] < DIGIT:
            return False
    # a fourth digit after the three: this is another number
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
    # two line ends are a paragraph, in which no word goes on
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
            # bounded, so that many `<` without an end cost linear time
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
    # two ends that only move forward: linear in the number of units
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
