"""Splitting by table: a pattern as an automaton that looks at each character once.

An automaton's state is the list of places in the pattern at which a backtracking engine might be, best first
(Thompson's construction, with the order of priorities that Perl's leftmost-first rule asks for); whatever
stands behind a finished match in that list is dropped, since backtracking would never come to it.  The next
character is known when a state is left, so a look at it costs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenizer.bpe.split_pattern import Choice, Next, Node, OneOf, Repeat, Sequence, Unsupported, parse

MOST_STATES = 2000
"""States of an automaton, at most: a pattern with more has numbers that multiply."""
MOST_CLASSES, MOST_KINDS = 60, 250
DEAD_STATE, FIRST_STATE = 0, 1
NUM_CODE_POINTS = 0x110000
BEHIND_CASED = 0x20000
"""No character from here on has a case."""
_BLOCK = 128
"""Characters that are asked for case together."""


@dataclass(frozen=True)
class Automaton:
    """What text is split by."""

    kinds: NDArray[np.uint8]
    """The kind of each code point, [code points]: the pattern makes no difference between those of one."""
    steps: NDArray[np.int32]
    """From a state, by the kind of the next character (the last column: the end of the text), twice the
    state to go to; plus one where a match ends before that character.  [states, kinds + 1]"""


@lru_cache(maxsize=8)
def automaton(pattern: str) -> Automaton:
    """Return the automaton of a pattern.

    Raises:
        Unsupported: the pattern is too large, or uses more than `tokenizer.bpe.split_pattern` reads.
    """
    program = _Program()
    start = program.add(parse(pattern), program.match)
    if len(program.classes) > MOST_CLASSES:
        raise Unsupported(f"{len(program.classes)} classes")
    members = np.stack([_members(class_) for class_ in program.classes])
    # code points that are in the same classes are of one kind
    signatures = (1 << np.arange(len(members))) @ members
    _, firsts, kinds = np.unique(signatures, return_index=True, return_inverse=True)
    if len(firsts) > MOST_KINDS:
        raise Unsupported(f"{len(firsts)} kinds of characters")
    # a code point that was not probed is of the kind of the last one before it
    runs = np.diff(_probe()[0], append=NUM_CODE_POINTS)
    # the end of the text is of no class
    of_kinds = np.c_[members[:, firsts], np.zeros(len(members), np.bool_)]
    return Automaton(np.repeat(kinds.astype(np.uint8), runs), _determined(program, start, of_kinds))


def _members(pattern: str) -> NDArray[np.bool_]:
    """Return which of the probed code points match a pattern for one character, as Oniguruma has it."""
    from tokenizers import Regex, normalizers

    codes, text, cased = _probe()
    if len(pattern) == 1 and pattern != ".":
        return codes == ord(pattern)
    some, text = (cased, "".join(map(chr, cased))) if pattern.startswith("(?i:") else (codes, text)
    try:
        left = normalizers.Replace(Regex(pattern), "").normalize_str(text)
    except Exception:  # the binding raises a bare Exception
        raise Unsupported(pattern) from None
    found = np.ones(len(codes), np.bool_) if some is codes else np.isin(codes, some)
    found[np.searchsorted(codes, np.frombuffer(left.encode("utf-32-le"), np.uint32))] = False
    return found


@lru_cache(maxsize=1)
def _probe() -> tuple[NDArray[np.uint32], str, NDArray[np.uint32]]:
    """Return the code points on which classes are looked up, in rising order, their text,
    and those that have a case."""
    codes = np.fromiter(code_points(), np.uint32)
    text = codes.tobytes().decode("utf-32-le")
    blocks = (text[i : i + _BLOCK] for i in range(0, int(np.searchsorted(codes, BEHIND_CASED)), _BLOCK))
    cased = [ord(c) for block in blocks if _has_case(block) for c in block if _has_case(c)]
    return codes, text, np.array(cased, np.uint32)


def _has_case(text: str) -> bool:
    return not text == text.lower() == text.upper() == text.casefold()


def code_points() -> Iterator[int]:
    """Yield all code points except the inside of large blocks that are of one kind,
    and of planes without characters."""
    for code in range(0x40000):
        uniform = 0xAC10 <= code < 0xD790 or 0xE010 <= code < 0xF8F0 or 0x20010 <= code < 0x2A000
        if not 0xD800 <= code < 0xE000 and not uniform:
            yield code
    yield from range(0xE0000, 0xE0200)
    yield from (0xF0000, 0xFFFFE, 0x100000, 0x10FFFE)  # private use, and the two code points behind it


class _Program:
    """A pattern as numbered instructions, each of which knows what comes after it."""

    match = 0

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.code: list[tuple[str, int, tuple[int, ...]]] = [("match", 0, ())]
        """(what, number of a class, instructions to go on with, the best first)"""

    def _emit(self, what: str, class_: int, *after: int) -> int:
        self.code.append((what, class_, after))
        if len(self.code) > MOST_STATES:
            raise Unsupported("too long")
        return len(self.code) - 1

    def _class(self, pattern: str) -> int:
        if pattern not in self.classes:
            self.classes.append(pattern)
        return self.classes.index(pattern)

    def add(self, node: Node, after: int) -> int:
        """Add a part of the pattern that goes on with instruction `after`; returns where it begins."""
        match node:
            case OneOf(pattern):
                return self._emit("take", self._class(pattern), after)
            case Next(pattern, negated):
                return self._emit("unless" if negated else "if", self._class(pattern), after)
            case Sequence(parts):
                for part in reversed(parts):
                    after = self.add(part, after)
                return after
            case Choice(options):
                return self._emit("either", 0, *[self.add(option, after) for option in options])
            case Repeat(part, least, most):
                return self._repeat(part, least, most, after)

    def _repeat(self, part: Node, least: int, most: int | None, after: int) -> int:
        if most is None:
            loop = self._emit("either", 0)
            self.code[loop] = ("either", 0, (self.add(part, loop), after))
            begin = loop
        else:
            begin = after
            for _ in range(most - least):
                begin = self._emit("either", 0, self.add(part, begin), after)
        for _ in range(least):
            begin = self.add(part, begin)
        return begin


def _determined(program: _Program, start: int, kinds: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the steps of the automaton; kinds of characters as [classes, kinds]."""
    numbers: dict[tuple[int, ...], int] = {(): DEAD_STATE, (start,): FIRST_STATE}
    steps = [[DEAD_STATE] * kinds.shape[1]]
    for state in _growing(numbers):
        row = []
        for kind in range(kinds.shape[1]):
            following, matched = _step(program, state, kinds[:, kind])
            row.append(2 * numbers.setdefault(following, len(numbers)) + matched)
        steps.append(row)
        if len(numbers) > MOST_STATES:
            raise Unsupported("too many states")
    return np.array(steps, np.int32)


def _growing(numbers: dict[tuple[int, ...], int]) -> Iterator[tuple[int, ...]]:
    """Yield the states behind the dead one, those too that are found on the way."""
    at = FIRST_STATE
    while at < len(numbers):
        yield list(numbers)[at]
        at += 1


def _step(program: _Program, state: tuple[int, ...],
          holds: NDArray[np.bool_]) -> tuple[tuple[int, ...], bool]:
    """Return where a state goes by a character of the classes that `holds` says, and whether a match
    ends before it."""
    following: dict[int, None] = {}
    seen: set[int] = set()
    stack = list(reversed(state))
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        what, class_, after = program.code[at]
        if what == "match":
            return tuple(following), True
        if what == "take":
            if holds[class_]:
                following[after[0]] = None
        elif what == "either" or holds[class_] == (what == "if"):
            stack += reversed(after)
    return tuple(following), False
