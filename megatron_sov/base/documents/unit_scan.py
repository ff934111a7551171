"""Numba loops for `overlap`: split folded text into units, and units into runs. Tables of code points are
built here, because numba's cache knows only this file's constants."""

import unicodedata
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import jit_compile
from megatron_sov.base.documents.scripts import RUN_HANGUL_SCRIPTS, RUN_SCRIPTS, list_code_points

SEPARATOR, WORD, QUARTER, THIRD, IGNORED, DIGIT = 0, 1, 2, 3, 4, 16
"""Character classes: separator, part of a word, unit that counts a quarter or a third of a word, ignored, or
the digit `class - DIGIT`."""
MANY = np.uint32(0xFFFFFFFF)
"""Marks a code point in `folds` that case folding turns into several."""
WORD_SIZE, QUARTER_SIZE, THIRD_SIZE = 12, 3, 4
"""Unit sizes in twelfths of a word."""
_TAG_CHARACTERS, _NAME_CHARACTERS = 400, 12
"""Longest tag, and longest name for an entity or TeX command, in characters."""
_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # MurmurHash3
_SHIFT = np.uint64(33)
_COMMA, _STOP, _QUOTE, _LOW_LINE, _BLANK, _HYPHEN = 0x2C, 0x2E, 0x27, 0x5F, 0x20, 0x2D
_LESS, _GREATER, _AMPERSAND, _SEMICOLON, _BACKSLASH, _SLASH, _EXCLAMATION, _HASH = (
    0x3C, 0x3E, 0x26, 0x3B, 0x5C, 0x2F, 0x21, 0x23)
_APOSTROPHE, _ARABIC_THOUSANDS, _UNICODE_HYPHEN = 0x2019, 0x066C, 0x2010
_NEW_LINE, _RETURN, _TAB, _ZERO, _NINE, _A, _Z = 0x0A, 0x0D, 0x09, 0x30, 0x39, 0x61, 0x7A
_INVISIBLE = ((0x034F, 0x0350), (0x115F, 0x1161), (0x17B4, 0x17B6), (0x180B, 0x1810), (0x3164, 0x3165),
              (0xFE00, 0xFE10), (0xFFA0, 0xFFA1), (0xE0000, 0xE1000))
"""Invisible code points (Default_Ignorable_Code_Point) outside the category Cf."""
_NAMED_PLANES = 0x30000
"""End of the code points with category lookup; higher code points are Han, invisible or unassigned."""
_COMMANDS = ("text", "textbf", "textit", "textrm", "texttt", "textsf", "textsc", "emph", "mathrm", "mathbf",
             "mathit", "mathsf", "mathtt", "boldsymbol", "bm", "left", "right", "big", "bigl", "bigr",
             "displaystyle", "textstyle", "limits", "quad", "qquad", "underline")
"""TeX commands that change appearance only."""


@jit_compile
def fold_case(codes: NDArray[np.uint32], folds: NDArray[np.uint32], classes: NDArray[np.uint8]) -> int:
    """Case-fold code points in place.

    Args:
        codes: code points [n].
        folds: code point -> folded code point, or `MANY`.
        classes: code point -> class.

    Returns:
        Flags: 1 if some characters are `IGNORED`, 2 if some stay, because they fold to several code points.
    """
    flags = 0
    for i in range(len(codes)):
        fold = folds[codes[i]]
        if fold == MANY:
            flags |= 2
        else:
            codes[i] = fold
        if classes[codes[i]] == IGNORED:
            flags |= 1
    return flags


# One pass with explicit state, which numba compiles to a loop without objects. A word's hash is FNV-1a over
# its code points. Digits of all scripts hash as ASCII digits, and thousands separators are left out, so that
# 1,000 and 1000 are equal words. A character of a script without blanks is a unit by itself.
@jit_compile
def scan_units(codes: NDArray[np.uint32], classes: NDArray[np.uint8], commands: NDArray[np.uint64],
               hashes: NDArray[np.uint64], sizes: NDArray[np.uint8], begins: NDArray[np.int64],
               ends: NDArray[np.int64]) -> int:
    """Find the units in a folded text.

    Args:
        codes: code points of the text without `IGNORED` characters.
        classes: code point -> class.
        commands: sorted `hash_word` of the TeX commands that are only markup.
        hashes: output, 64-bit hash of each unit; all outputs have room for one unit per code point.
        sizes: output, size of each unit in twelfths of a word.
        begins: output, first index of each unit in `codes`.
        ends: output, end index (exclusive) of each unit in `codes`.

    Returns:
        The number of units.
    """
    count, index, begin, end, group_digits, num_groups = 0, 0, 0, 0, 0, 0
    is_open = is_number = False  # whether a word has begun, and has only digits
    value = _OFFSET
    while index < len(codes):
        code = np.int64(codes[index])
        kind = np.int64(classes[code])
        if kind == WORD or kind >= DIGIT:
            if not is_open:
                is_open = is_number = True
                begin, group_digits, num_groups, value = index, 0, 0, _OFFSET
            if kind >= DIGIT:
                code = _ZERO + kind - DIGIT
                group_digits += 1
            else:
                is_number = False
            value = (value ^ np.uint64(code)) * _PRIME
            index += 1
            end = index
            continue
        if is_open and kind == SEPARATOR:
            if is_number and _is_thousands_separator(codes, classes, index, group_digits, num_groups):
                index, group_digits, num_groups = index + 1, 0, num_groups + 1
                continue
            next_index = 0 if is_number else _skip_hyphen(codes, classes, index)
            if next_index:
                index = next_index
                continue
        if is_open:
            hashes[count], sizes[count], begins[count], ends[count] = _mix_bits(value), WORD_SIZE, begin, end
            count += 1
            is_open = False
        if kind == SEPARATOR:
            index = _skip_markup(codes, classes, commands, index)
            continue
        hashes[count] = _mix_bits((_OFFSET ^ np.uint64(code)) * _PRIME)
        sizes[count] = QUARTER_SIZE if kind == QUARTER else THIRD_SIZE
        begins[count], ends[count] = index, index + 1
        count += 1
        index += 1
    if is_open:
        hashes[count], sizes[count], begins[count], ends[count] = _mix_bits(value), WORD_SIZE, begin, end
        count += 1
    return count


@jit_compile
def hash_word(codes: NDArray[np.uint32]) -> np.uint64:
    """Return a word's 64-bit hash, equal to the hash in `scan_units`."""
    value = _OFFSET
    for code in codes:
        value = (value ^ np.uint64(code)) * _PRIME
    return _mix_bits(value)


@jit_compile
def _mix_bits(value: np.uint64) -> np.uint64:
    """Spread differences between words over 64 bits (finalizer of MurmurHash3)."""
    value = (value ^ (value >> _SHIFT)) * _MIX_1
    value = (value ^ (value >> _SHIFT)) * _MIX_2
    return value ^ (value >> _SHIFT)


@jit_compile
def _is_thousands_separator(codes: NDArray[np.uint32], classes: NDArray[np.uint8], index: int,
                            group_digits: int, num_groups: int) -> bool:
    """Return whether the character at `index` separates thousands: 1,000 and 1 000 equal 1000. The number has
    `num_groups` groups before the last separator, and `group_digits` digits after it."""
    code = codes[index]
    if code not in (_COMMA, _STOP, _QUOTE, _LOW_LINE, _BLANK, _APOSTROPHE, _ARABIC_THOUSANDS):
        return False
    # groups have three digits; only the first group may be shorter
    if not (group_digits == 3 or (num_groups == 0 and 1 <= group_digits < 3)) or index + 3 >= len(codes):
        return False
    for position in range(index + 1, index + 4):
        if classes[codes[position]] < DIGIT:
            return False
    # a fourth digit starts a separate number
    return index + 4 == len(codes) or bool(classes[codes[index + 4]] < DIGIT)


@jit_compile
def _skip_hyphen(codes: NDArray[np.uint32], classes: NDArray[np.uint8], index: int) -> int:
    """Return the index after a hyphen and a line end inside a word, or 0."""
    if codes[index] != _HYPHEN and codes[index] != _UNICODE_HYPHEN:
        return 0
    index += 1
    num_lines = 0
    while index < len(codes) and (codes[index] == _BLANK or codes[index] == _TAB or codes[index] == _RETURN
                                  or codes[index] == _NEW_LINE):
        if codes[index] == _NEW_LINE:
            num_lines += 1
        index += 1
    # two line ends separate paragraphs
    return index if num_lines == 1 and index < len(codes) and classes[codes[index]] == WORD else 0


@jit_compile
def _skip_markup(codes: NDArray[np.uint32], classes: NDArray[np.uint8], commands: NDArray[np.uint64],
                 index: int) -> int:
    """Return the index after a separator, or after a tag, entity or formatting command."""
    code, after = codes[index], index + 1
    if after == len(codes):
        return after
    if code == _LESS:
        first = codes[after]
        if _A <= first <= _Z or first in (_SLASH, _EXCLAMATION):
            # limited search: many `<` without `>` must cost linear time
            for position in range(after + 1, min(after + _TAG_CHARACTERS, len(codes))):
                if codes[position] == _GREATER:
                    return position + 1
                if codes[position] == _LESS:
                    return after
    elif code == _AMPERSAND:
        position = after
        limit = min(after + _NAME_CHARACTERS, len(codes))
        while position < limit and (codes[position] == _HASH or _ZERO <= codes[position] <= _NINE
                                    or _A <= codes[position] <= _Z):
            position += 1
        if after < position < len(codes) and codes[position] == _SEMICOLON:
            return position + 1
    elif code == _BACKSLASH:
        position = after
        while position < len(codes) and _A <= codes[position] <= _Z and position <= after + _NAME_CHARACTERS:
            position += 1
        if position > after:
            name = hash_word(codes[after:position])
            row = np.searchsorted(commands, name)
            if row < len(commands) and commands[row] == name:
                return position
    return after


@jit_compile
def find_run_ends(sizes: NDArray[np.uint8], target: int, ends: NDArray[np.int64]) -> int:
    """Find, for each unit, the end of the shortest run of units that begins there and reaches a size.

    Args:
        sizes: size of each unit.
        target: minimum size of a run, in the same measure.
        ends: output, end index (exclusive) of each run; room for one per unit.

    Returns:
        The number of runs; from the units after these, the text is too short for a run.
    """
    # both ends only move forward: linear time
    size, end = np.int64(0), 0
    for begin in range(len(sizes)):
        while size < target:
            if end == len(sizes):
                return begin
            size += np.int64(sizes[end])
            end += 1
        ends[begin] = end
        size -= np.int64(sizes[begin])
    return len(sizes)


def to_code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(bytearray(text.encode("utf-32-le", errors="surrogatepass")), np.uint32)


@lru_cache(maxsize=1)
def get_classes() -> NDArray[np.uint8]:
    """Return a class per code point."""
    classes = np.full(0x110000, WORD, np.uint8)
    for begin, end in list_code_points(RUN_SCRIPTS):
        classes[begin:end] = QUARTER
    for begin, end in list_code_points(RUN_HANGUL_SCRIPTS):
        classes[begin:end] = THIRD
    # after the ranges of scripts, which include some marks and digits
    for code in range(_NAMED_PLANES):
        category = unicodedata.category(chr(code))
        if category[0] in "PSZ" or category == "Cc":
            classes[code] = SEPARATOR
        elif category == "Cf":
            classes[code] = IGNORED
        elif category == "Nd":
            classes[code] = DIGIT + unicodedata.digit(chr(code))
    for begin, end in _INVISIBLE:
        classes[begin:end] = IGNORED
    return classes


@lru_cache(maxsize=1)
def get_folds() -> NDArray[np.uint32]:
    """Return the case-folded code point per code point; `MANY` for several."""
    folds = np.arange(0x110000, dtype=np.uint32)
    for code in range(_NAMED_PLANES):
        if (folded := chr(code).casefold()) != chr(code):
            folds[code] = ord(folded) if len(folded) == 1 else MANY
    return folds


@lru_cache(maxsize=1)
def hash_commands() -> NDArray[np.uint64]:
    """Return the sorted hashes of `_COMMANDS`, for `scan_units`."""
    return np.sort(np.array([hash_word(to_code_points(name)) for name in _COMMANDS], np.uint64))
