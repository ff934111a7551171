"""Reading a split pattern: the part of Oniguruma's language that patterns of tokenizers use, as a tree.

Alternatives, groups without memory, greedy repetition, character classes, letters of either case, and a look
at the next character.  What each class holds is not decided here: its text is kept, for Oniguruma to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_sov.base.errors import UserError
from tokenizer.presets import Preset

_CLASS = re.compile(r"\\[pP]\{\^?\w+\}|\\[wdshWDSH]|\.")
_CONTROL = {r"\r": "\r", r"\n": "\n", r"\t": "\t", r"\f": "\f", r"\v": "\v"}
_NUMBERS = re.compile(r"\{(\d+)(,?)(\d*)\}")
_SPECIAL = "\\^$.|?*+()[]{}"
MOST_REPEATS = 100
LAST_LONG_FOLDING = 0xFB17
"""The last character that folds to several: an Armenian ligature."""


class UnsupportedPattern(Exception):
    """A pattern uses what is not read here."""


@dataclass(frozen=True)
class CharacterClass:
    """A character of a class, which is a pattern for one character."""

    pattern: str


@dataclass(frozen=True)
class Lookahead:
    """Nothing, where the next character is of a class; `negated`: where it is of another, or the end."""

    pattern: str
    negated: bool


@dataclass(frozen=True)
class PatternSequence:
    """One after another."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class PatternChoice:
    """The first of several that matches."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """As often as possible."""

    part: Node
    least: int
    most: int | None


Node = CharacterClass | Lookahead | PatternSequence | PatternChoice | Repeat


def parse_pattern(pattern: str) -> Node:
    """Return the tree of a pattern.

    Raises:
        Unsupported: the pattern uses more, or may match empty text.
    """
    parser = _Parser(pattern)
    tree = parser.choice(ignore_case=False)
    # what is left could not be read as a whole, such as a closing bracket without its opening one
    if parser.rest():
        raise UnsupportedPattern(parser.rest())
    # the automaton would stand still on a match without a character
    if may_be_empty(tree):
        raise UnsupportedPattern(pattern)
    return tree


def may_be_empty(node: Node) -> bool:
    """Return whether a part may match without taking a character."""
    match node:
        case CharacterClass():
            return False
        # a look ahead takes nothing
        case Lookahead():
            return True
        case PatternSequence(parts):
            return all(map(may_be_empty, parts))
        case PatternChoice(options):
            return any(map(may_be_empty, options))
        case Repeat(part, least, _):
            return not least or may_be_empty(part)


class _Parser:
    """Reads from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    def rest(self) -> str:
        return self._pattern[self._at :]

    def _take(self, text: str) -> bool:
        """Pass over `text` where it comes next; returns whether it does."""
        taken = self._pattern.startswith(text, self._at)
        self._at += len(text) if taken else 0
        return taken

    def choice(self, ignore_case: bool) -> Node:
        options = [self._sequence(ignore_case)]
        while self._take("|"):
            options.append(self._sequence(ignore_case))
        return PatternChoice(tuple(options)) if len(options) > 1 else options[0]

    def _sequence(self, ignore_case: bool) -> Node:
        parts = []
        while self.rest() and self.rest()[0] not in "|)":
            parts.append(self._repeated(self._atom(ignore_case)))
        return PatternSequence(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        """Read the quantifier behind a part, if there is one."""
        if numbers := _NUMBERS.match(self._pattern, self._at):
            self._at = numbers.end()
            least = int(numbers[1])
            most: int | None = least
            if numbers[2]:  # {n,} has no upper end
                most = int(numbers[3]) if numbers[3] else None
        elif self.rest()[:1] in ("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.rest()[0]]
            self._at += 1
        else:
            return part
        # lazy, possessive or twice; more than it is good to write out; or round and round without a character
        if (self.rest()[:1] in ("*", "+", "?", "{") or max(least, most or 0) > MOST_REPEATS
                or (most is not None and most < least) or may_be_empty(part)):
            raise UnsupportedPattern(self.rest())
        return Repeat(part, least, most)

    def _atom(self, ignore_case: bool) -> Node:
        for opening, negated in (("(?!", True), ("(?=", False)):
            if self._take(opening):
                look = self.choice(ignore_case)
                # one character is enough for the patterns in use, and is known when a state is left
                if not isinstance(look, PatternSequence) or len(look.parts) != 1:
                    raise UnsupportedPattern(opening)
                (only,) = look.parts
                if not isinstance(only, CharacterClass):
                    raise UnsupportedPattern(opening)
                return self._closed(Lookahead(only.pattern, negated))
        if self._take("(?:"):
            return self._closed(self.choice(ignore_case))
        if self._take("(?i:"):
            start = self._at
            inside = self.choice(ignore_case=True)
            # Oniguruma folds some characters to two; a table that looks at one at a time cannot
            if _has_long_folding(self._pattern[start : self._at]):
                raise UnsupportedPattern("(?i:")
            return self._closed(inside)
        return self._character(ignore_case)

    def _closed(self, node: Node) -> Node:
        if not self._take(")"):
            raise UnsupportedPattern(self.rest())
        return node

    def _character(self, ignore_case: bool) -> CharacterClass:
        """Read what stands for one character."""
        if self.rest()[0] == "[" or _CLASS.match(self._pattern, self._at):
            # what a class holds without case is a matter of the engine's tables: not read here
            if ignore_case:
                raise UnsupportedPattern(self.rest())
            return CharacterClass(self._bracket() if self.rest()[0] == "[" else self._match(_CLASS))
        character = self._match(re.compile(r"\\.|.", re.DOTALL))
        if character in _CONTROL:
            return CharacterClass(_CONTROL[character])
        if character in _SPECIAL or (len(character) > 1 and character[1].isalnum()):
            raise UnsupportedPattern(character)
        return CharacterClass(f"(?i:{character})" if ignore_case and character[-1].isalpha() else character)

    def _match(self, expression: re.Pattern[str]) -> str:
        found = expression.match(self._pattern, self._at)
        assert found is not None
        self._at = found.end()
        return found[0]

    def _bracket(self) -> str:
        """Read a class in brackets, which may hold others."""
        start, depth = self._at, 0
        while self.rest():
            part = self._match(re.compile(r"\\.|\[\^?\]?|.", re.DOTALL))
            if part.startswith("[") and part.endswith("]"):
                raise UnsupportedPattern(part)
            depth += part.startswith("[") - (part == "]")
            if not depth:
                return self._pattern[start : self._at]
        raise UnsupportedPattern(self._pattern[start:])


def _has_long_folding(text: str) -> bool:
    """Return whether letters of a text, in either case, are what one other character folds to:
    "ss" and the sharp s."""
    return any(folded in text.casefold() for folded in _find_long_foldings()) or any(
        len(c.casefold()) > 1 for c in text)


@cache
def _find_long_foldings() -> frozenset[str]:
    return frozenset(folded for c in range(LAST_LONG_FOLDING + 1) if len(folded := chr(c).casefold()) > 1)


# Splitting by table: a pattern as an automaton that looks at each character once.
#
# An automaton's state is the list of places in the pattern at which a backtracking engine might be, best
# first
# (Thompson's construction, with the order of priorities that Perl's leftmost-first rule asks for); whatever
# stands behind a finished match in that list is dropped, since backtracking would never come to it.  The
# next
# character is known when a state is left, so a look at it costs nothing more.

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
def build_automaton(pattern: str) -> Automaton:
    """Return the automaton of a pattern.

    Raises:
        Unsupported: the pattern is too large, or uses more than `tokenizer.bpe.split_pattern` reads.
    """
    program = _Program()
    start = program.add(parse_pattern(pattern), program.match)
    if len(program.classes) > MOST_CLASSES:
        raise UnsupportedPattern(f"{len(program.classes)} classes")
    members = np.stack([_find_members(class_) for class_ in program.classes])
    # code points that are in the same classes are of one kind
    # a bit for each class, at most MOST_CLASSES of 64
    signatures = (1 << np.arange(len(members))) @ members
    _, firsts, kinds = np.unique(signatures, return_index=True, return_inverse=True)
    if len(firsts) > MOST_KINDS:
        raise UnsupportedPattern(f"{len(firsts)} kinds of characters")
    # a code point that was not probed is of the kind of the last one before it
    runs = np.diff(_build_probe()[0], append=NUM_CODE_POINTS)
    # the end of the text is of no class
    of_kinds = np.c_[members[:, firsts], np.zeros(len(members), np.bool_)]
    return Automaton(np.repeat(kinds.astype(np.uint8), runs), _determinize(program, start, of_kinds))


def _find_members(pattern: str) -> NDArray[np.bool_]:
    """Return which of the probed code points match a pattern for one character, as Oniguruma has it."""
    codes, text, cased = _build_probe()
    # a plain character needs no engine
    if len(pattern) == 1 and pattern != ".":
        return codes == ord(pattern)
    some, text = (cased, "".join(map(chr, cased))) if pattern.startswith("(?i:") else (codes, text)
    try:
        # what is left after a replacement is what does not match: one call for all of Unicode
        left = normalizers.Replace(Regex(pattern), "").normalize_str(text)
    except Exception:  # the binding raises a bare Exception
        raise UnsupportedPattern(pattern) from None
    # characters without case were not asked: a single letter without case cannot match them
    found = np.ones(len(codes), np.bool_) if some is codes else np.isin(codes, some)
    found[np.searchsorted(codes, np.frombuffer(left.encode("utf-32-le"), np.uint32))] = False
    return found


@lru_cache(maxsize=1)
def _build_probe() -> tuple[NDArray[np.uint32], str, NDArray[np.uint32]]:
    """Return the code points on which classes are looked up, in rising order, their text,
    and those that have a case."""
    codes = np.fromiter(iter_code_points(), np.uint32)
    text = codes.tobytes().decode("utf-32-le")
    blocks = (text[i : i + _BLOCK] for i in range(0, int(np.searchsorted(codes, BEHIND_CASED)), _BLOCK))
    cased = [ord(c) for block in blocks if _has_case(block) for c in block if _has_case(c)]
    return codes, text, np.array(cased, np.uint32)


def _has_case(text: str) -> bool:
    return not text == text.lower() == text.upper() == text.casefold()


def iter_code_points() -> Iterator[int]:
    """Yield all code points except the inside of large blocks that are of one kind,
    and of planes without characters."""
    for code in range(0x40000):
        # Hangul syllables, private use and Han extension B: their ends are probed, and stand for the inside
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
            raise UnsupportedPattern("too long")
        return len(self.code) - 1

    def _class(self, pattern: str) -> int:
        if pattern not in self.classes:
            self.classes.append(pattern)
        return self.classes.index(pattern)

    def add(self, node: Node, after: int) -> int:
        """Add a part of the pattern that goes on with instruction `after`; returns where it begins."""
        match node:
            case CharacterClass(pattern):
                return self._emit("take", self._class(pattern), after)
            case Lookahead(pattern, negated):
                return self._emit("unless" if negated else "if", self._class(pattern), after)
            case PatternSequence(parts):
                # built from the end: each instruction knows what comes after it
                for part in reversed(parts):
                    after = self.add(part, after)
                return after
            case PatternChoice(options):
                return self._emit("either", 0, *[self.add(option, after) for option in options])
            case Repeat(part, least, most):
                return self._repeat(part, least, most, after)

    def _repeat(self, part: Node, least: int, most: int | None, after: int) -> int:
        if most is None:
            # the loop refers to itself, so its instruction is made first and completed after its body
            loop = self._emit("either", 0)
            self.code[loop] = ("either", 0, (self.add(part, loop), after))
            begin = loop
        else:
            begin = after
            for _ in range(most - least):
                # greedy: to take one more is the better choice, and to stop stays possible each time
                begin = self._emit("either", 0, self.add(part, begin), after)
        for _ in range(least):
            begin = self.add(part, begin)
        return begin


def _determinize(program: _Program, start: int, kinds: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the steps of the automaton; kinds of characters as [classes, kinds]."""
    # a state is an ordered tuple: two with the same places in another order prefer other matches
    numbers: dict[tuple[int, ...], int] = {(): DEAD_STATE, (start,): FIRST_STATE}
    steps = [[DEAD_STATE] * kinds.shape[1]]
    for state in _iter_states(numbers):
        row = []
        for kind in range(kinds.shape[1]):
            following, matched = _find_next_state(program, state, kinds[:, kind])
            # the match is a bit of the step, so the loop reads one number for each character
            row.append(2 * numbers.setdefault(following, len(numbers)) + matched)
        steps.append(row)
        if len(numbers) > MOST_STATES:
            raise UnsupportedPattern("too many states")
    return np.array(steps, np.int32)


def _iter_states(numbers: dict[tuple[int, ...], int]) -> Iterator[tuple[int, ...]]:
    """Yield the states behind the dead one, those too that are found on the way."""
    at = FIRST_STATE
    while at < len(numbers):
        # the dictionary grows while its states are worked off, in the order in which they were found
        yield list(numbers)[at]
        at += 1


def _find_next_state(program: _Program, state: tuple[int, ...],
          holds: NDArray[np.bool_]) -> tuple[tuple[int, ...], bool]:
    """Return where a state goes by a character of the classes that `holds` says, and whether a match
    ends before it."""
    following: dict[int, None] = {}
    seen: set[int] = set()
    # the best place is on top: priorities are the order of a depth-first walk
    stack = list(reversed(state))
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        what, class_, after = program.code[at]
        if what == "match":
            # places behind a match are of lower priority, and backtracking would never come to them
            return tuple(following), True
        if what == "take":
            if holds[class_]:
                following[after[0]] = None
        # a look ahead that fails ends its branch
        elif what == "either" or holds[class_] == (what == "if"):
            stack += reversed(after)
    return tuple(following), False


# Splitting text into the units within which bytes merge: as `tokenizers` does, many times as fast.
#
# A finished tokenizer splits by Oniguruma.  Where the pattern can be read, text is split by an automaton in
# compiled code instead (tokenizer/bpe/split_pattern.py), which takes from Oniguruma what the classes of
# characters hold; else by Oniguruma itself, and so too when the two are seen to differ.  The result
# therefore
# never depends on which of them did the work.

_PROBES = ("", " ", "  ", "\n", "a", "A1 b", "'s 'S 'ſ x", "한국어 1", "e\u0301 \u0e01\u0e33\u0e25 \u3000x",
           "!? \r\n\t z", "\u00a0a \u00a0")


def build_untrained_tokenizer(preset: Preset, pattern: str | None = None) -> Tokenizer:
    """Return a tokenizer with the preset's rules and no vocabulary; `pattern`:
    another split than the final one.

    Raises:
        UserError: the split pattern is not a regular expression, or matches empty text.
    """
    tokenizer = Tokenizer(models.BPE())
    if preset.normalization == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    # use_regex=False: the split is the only one; add_prefix_space would change the text
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = build_splitter(preset.final_pattern if pattern is None else pattern, preset.name)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_splitter(pattern: str, name: str) -> Any:
    """Return the pre-tokenizer that splits by a pattern.

    Raises:
        UserError: the pattern does not compile, or can match empty text.
    """
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"preset {name}: split pattern {pattern!r} is no regular expression ({e})") from None
    if found := _find_empty_match(pattern):
        raise UserError(f"preset {name}: split pattern {pattern!r} can match empty text ({found}); "
                        "let every alternative take at least one character, e.g. + instead of *")
    return split


def check_coverage(pattern: str, name: str) -> None:
    """Check that a pattern passes over no character: tiktoken, unlike `tokenizers`, would lose it.

    Raises:
        UserError: it does.
    """
    text = "".join(map(chr, iter_code_points()))
    # also backwards, with a space in front: some alternatives hold only behind one
    for probe in (text, " " + text[::-1]):
        if left := normalizers.Replace(Regex(pattern), "").normalize_str(probe):
            raise UserError(f"preset {name}: split pattern {pattern!r} passes over some text, "
                            f"such as U+{ord(left[0]):04X}; let it match every character, e.g. "
                            "by |[\\s\\S] at its end")


def _find_empty_match(pattern: str) -> str:
    """Return where a pattern matches no character, or an empty string."""
    try:
        compiled = regex.compile(pattern)
    except regex.error:
        return ""  # Oniguruma alone knows the pattern; the splits that it gives are what counts
    # the module `regex` is close to Oniguruma, and tells an empty match, which `tokenizers` does not
    for probe in _PROBES:
        if any(match.start() == match.end() for match in compiled.finditer(probe)):
            return f"in {probe!r}" if probe else "at once"
    return ""
