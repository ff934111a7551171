"""Split text by a preset's pattern, with a compiled automaton if the pattern allows, else with Oniguruma.

A finished tokenizer splits with Oniguruma.  The automaton takes the members of character classes from
Oniguruma and is compared with it on text of every unit, so the result does not depend on the engine.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers

from tokenizer.bpe.counting import split_words
from tokenizer.bpe.split_pattern import (
    CharacterClass, Lookahead, Node, PatternChoice, PatternSequence, Repeat, UnsupportedPattern,
    build_splitter, iter_code_points, parse_pattern)
from tokenizer.presets import Preset

PROBE_CHARS = 20_000
"""Text per unit on which automaton and Oniguruma are compared."""
MOST_STATES = 2000
"""Maximum states; repetition counts multiply states."""
MOST_CLASSES, MOST_KINDS = 60, 250  # of characters, in a pattern
DEAD_STATE, FIRST_STATE = 0, 1
NUM_CODE_POINTS = 0x110000
AFTER_CASED = 0x20000
"""Code points from here on have no case."""
_BLOCK = 128
"""Characters per test for case."""


class Splitter:
    """Splits normalized text by a pattern; one object per process.

    >>> from tokenizer.presets import PRESETS
    >>> preset = PRESETS["solar-open"]
    >>> Splitter(preset, preset.split_pattern).split_text("It's 2026.")
    ['It', "'s", ' ', '2', '0', '2', '6', '.']

    Raises:
        UserError: the pattern does not compile, or can match empty text.
    """

    def __init__(self, preset: Preset, pattern: str) -> None:
        self._oniguruma = build_splitter(pattern, preset.name)
        self._normalizer = normalizers.NFC() if preset.normalization == "nfc" else None
        self._automaton: Automaton | None = None
        try:
            self._automaton = build_automaton(pattern)
        except UnsupportedPattern:
            return

    def normalize(self, text: str) -> str:
        if self._normalizer is None or text.isascii():
            return text
        return str(self._normalizer.normalize_str(text))

    def find_ends(self, raw: bytes) -> NDArray[np.int32]:
        """Return the piece ends in `raw`, normalized UTF-8, in bytes."""
        if self._automaton is None:
            pieces = self._oniguruma.pre_tokenize_str(raw.decode())
            return np.cumsum([len(piece.encode()) for piece, _ in pieces], dtype=np.int32)
        ends = np.empty(len(raw), np.int32)
        kinds, steps = self._automaton.kinds, self._automaton.steps
        return ends[: split_words(np.frombuffer(raw, np.uint8), kinds, steps, ends)]

    def split_text(self, text: str) -> list[str]:
        """Split normalized text; `"".join(pieces)` is the text."""
        raw, ends = text.encode(), [0, *self.find_ends(text.encode()).tolist()]
        return [raw[start:end].decode() for start, end in pairwise(ends)]

    def compare_engines(self, text: str) -> None:
        """Compare automaton and Oniguruma on a text; if they differ, use Oniguruma from now on."""
        text = text[:PROBE_CHARS]
        if self.split_text(text) != [piece for piece, _ in self._oniguruma.pre_tokenize_str(text)]:
            self._automaton = None


@dataclass(frozen=True)
class Automaton:
    """A split pattern as a table that reads each character once.

    A state is the ordered list of pattern positions at which a backtracking engine may be, best first
    (Thompson's construction with Perl's leftmost-first priorities).  Positions after a finished match are
    dropped, because backtracking never reaches them.  The next character is known when a state is left, so
    a lookahead costs nothing."""

    kinds: NDArray[np.uint8]
    """Kinds, [code points]; the pattern treats code points with equal kind alike."""
    steps: NDArray[np.int32]
    """2 * next state by state and kind of the next character, + 1 if a match ends before that character,
    [states, kinds + 1]. The last column is the end of the text."""


@lru_cache(maxsize=8)
def build_automaton(pattern: str) -> Automaton:
    """Compile a pattern. Raises `UnsupportedPattern`: unsupported syntax, or the pattern is too large."""
    program = _Program()
    start = program.add_node(parse_pattern(pattern), program.match)
    if len(program.classes) > MOST_CLASSES:
        raise UnsupportedPattern(f"{len(program.classes)} classes")
    members = np.stack([_find_members(class_) for class_ in program.classes])
    # code points in the same classes are of one kind; a bit per class fits 64 bits
    signatures = (1 << np.arange(len(members))) @ members
    _, firsts, kinds = np.unique(signatures, return_index=True, return_inverse=True)
    if len(firsts) > MOST_KINDS:
        raise UnsupportedPattern(f"{len(firsts)} kinds of characters")
    # a code point outside the probe has the kind of the preceding probed code point
    runs = np.diff(_build_probe()[0], append=NUM_CODE_POINTS)
    # the end of the text is in no class
    kind_classes = np.c_[members[:, firsts], np.zeros(len(members), np.bool_)]
    return Automaton(np.repeat(kinds.astype(np.uint8), runs), _determinize(program, start, kind_classes))


def _find_members(pattern: str) -> NDArray[np.bool_]:
    """Return which probed code points Oniguruma matches with a pattern for one character."""
    codes, text, cased = _build_probe()
    if len(pattern) == 1 and pattern != ".":
        return codes == ord(pattern)
    is_member = np.ones(len(codes), np.bool_)
    if pattern.startswith("(?i:"):
        # a letter with case matches no character without case
        is_member, text = np.isin(codes, cased), "".join(map(chr, cased))
    try:
        # a replacement keeps the characters that do not match: one call for all of Unicode
        unmatched = normalizers.Replace(Regex(pattern), "").normalize_str(text)
    except Exception:  # the binding raises a bare Exception
        raise UnsupportedPattern(pattern) from None
    is_member[np.searchsorted(codes, np.frombuffer(unmatched.encode("utf-32-le"), np.uint32))] = False
    return is_member


@lru_cache(maxsize=1)
def _build_probe() -> tuple[NDArray[np.uint32], str, NDArray[np.uint32]]:
    """Return the code points on which classes are tested, rising, their text, and the ones with a case."""
    codes = np.fromiter(iter_code_points(), np.uint32)
    text = codes.tobytes().decode("utf-32-le")
    blocks = (text[i : i + _BLOCK] for i in range(0, int(np.searchsorted(codes, AFTER_CASED)), _BLOCK))
    cased = [ord(c) for block in blocks if _has_case(block) for c in block if _has_case(c)]
    return codes, text, np.array(cased, np.uint32)


def _has_case(text: str) -> bool:
    return not text == text.lower() == text.upper() == text.casefold()


class _Program:
    """A pattern as instructions (operation, class index, next instructions, best first)."""

    match = 0

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.code: list[tuple[str, int, tuple[int, ...]]] = [("match", 0, ())]

    def _add_instruction(self, operation: str, class_: int, *after: int) -> int:
        self.code.append((operation, class_, after))
        if len(self.code) > MOST_STATES:
            raise UnsupportedPattern("too long")
        return len(self.code) - 1

    def _add_class(self, pattern: str) -> int:
        if pattern not in self.classes:
            self.classes.append(pattern)
        return self.classes.index(pattern)

    def add_node(self, node: Node, after: int) -> int:
        """Add a node that continues with instruction `after`; return its first instruction."""
        match node:
            case CharacterClass(pattern):
                return self._add_instruction("take", self._add_class(pattern), after)
            case Lookahead(pattern, negated):
                operation = "unless" if negated else "if"
                return self._add_instruction(operation, self._add_class(pattern), after)
            case PatternSequence(parts):
                for part in reversed(parts):
                    after = self.add_node(part, after)
                return after
            case PatternChoice(options):
                return self._add_instruction("either", 0, *[self.add_node(option, after)
                                                            for option in options])
            case Repeat(part, least, most):
                return self._add_repeat(part, least, most, after)

    def _add_repeat(self, part: Node, least: int, most: int | None, after: int) -> int:
        if most is None:
            # a loop refers to its own index: add the instruction first, complete it after the body
            loop = self._add_instruction("either", 0)
            self.code[loop] = ("either", 0, (self.add_node(part, loop), after))
            begin = loop
        else:
            begin = after
            for _ in range(most - least):
                # greedy: one more repetition is the better option
                begin = self._add_instruction("either", 0, self.add_node(part, begin), after)
        for _ in range(least):
            begin = self.add_node(part, begin)
        return begin


def _determinize(program: _Program, start: int, kind_classes: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return `Automaton.steps`; `kind_classes`: class membership, [classes, kinds + 1]."""
    # ordered tuples: the same positions in another order prefer other matches
    numbers: dict[tuple[int, ...], int] = {(): DEAD_STATE, (start,): FIRST_STATE}
    steps = [[DEAD_STATE] * kind_classes.shape[1]]
    while len(steps) < len(numbers):
        state = list(numbers)[len(steps)]
        row = []
        for kind in range(kind_classes.shape[1]):
            next_state, is_match = _find_next_state(program, state, kind_classes[:, kind])
            row.append(2 * numbers.setdefault(next_state, len(numbers)) + is_match)
        steps.append(row)
        if len(numbers) > MOST_STATES:
            raise UnsupportedPattern("too many states")
    return np.array(steps, np.int32)


def _find_next_state(program: _Program, state: tuple[int, ...],
                     in_class: NDArray[np.bool_]) -> tuple[tuple[int, ...], bool]:
    """Return the next state for a character, given its classes, and whether a match ends before it."""
    next_state: dict[int, None] = {}
    visited: set[int] = set()
    # depth first, with the best position on top of the stack
    stack = list(reversed(state))
    while stack:
        position = stack.pop()
        if position in visited:
            continue
        visited.add(position)
        operation, class_, after = program.code[position]
        if operation == "match":
            # positions after a match have lower priority: backtracking never reaches them
            return tuple(next_state), True
        if operation == "take":
            if in_class[class_]:
                next_state[after[0]] = None
        # a failed lookahead ends its branch
        elif operation == "either" or in_class[class_] == (operation == "if"):
            stack += reversed(after)
    return tuple(next_state), False
