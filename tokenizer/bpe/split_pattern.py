"""Reading a split pattern: the part of Oniguruma's language that patterns of tokenizers use, as a tree.

Alternatives, groups without memory, greedy repetition, character classes, letters of either case, and a look
at the next character.  What each class holds is not decided here: its text is kept, for Oniguruma to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_CLASS = re.compile(r"\\[pP]\{\^?\w+\}|\\[wdshWDSH]|\.")
_CONTROL = {r"\r": "\r", r"\n": "\n", r"\t": "\t", r"\f": "\f", r"\v": "\v"}
_NUMBERS = re.compile(r"\{(\d+)(,?)(\d*)\}")
_SPECIAL = "\\^$.|?*+()[]{}"
MOST_REPEATS = 100
LAST_LONG_FOLDING = 0xFB17
"""The last character that folds to several: an Armenian ligature."""


class Unsupported(Exception):
    """A pattern uses what is not read here."""


@dataclass(frozen=True)
class OneOf:
    """A character of a class, which is a pattern for one character."""

    pattern: str


@dataclass(frozen=True)
class Next:
    """Nothing, where the next character is of a class; `negated`: where it is of another, or the end."""

    pattern: str
    negated: bool


@dataclass(frozen=True)
class Sequence:
    """One after another."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """The first of several that matches."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """As often as possible."""

    part: Node
    least: int
    most: int | None


Node = OneOf | Next | Sequence | Choice | Repeat


def parse(pattern: str) -> Node:
    """Return the tree of a pattern.

    Raises:
        Unsupported: the pattern uses more, or may match empty text.
    """
    parser = _Parser(pattern)
    tree = parser.choice(ignore_case=False)
    if parser.rest():
        raise Unsupported(parser.rest())
    if may_be_empty(tree):
        raise Unsupported(pattern)
    return tree


def may_be_empty(node: Node) -> bool:
    """Return whether a part may match without taking a character."""
    match node:
        case OneOf():
            return False
        case Next():
            return True
        case Sequence(parts):
            return all(map(may_be_empty, parts))
        case Choice(options):
            return any(map(may_be_empty, options))
        case Repeat(part, least, _):
            return not least or may_be_empty(part)


class _Parser:
    """Reads from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    def rest(self) -> str:
        """Return what is not read yet."""
        return self._pattern[self._at :]

    def _take(self, text: str) -> bool:
        """Pass over `text` where it comes next; returns whether it does."""
        taken = self._pattern.startswith(text, self._at)
        self._at += len(text) if taken else 0
        return taken

    def choice(self, ignore_case: bool) -> Node:
        """Read alternatives."""
        options = [self._sequence(ignore_case)]
        while self._take("|"):
            options.append(self._sequence(ignore_case))
        return Choice(tuple(options)) if len(options) > 1 else options[0]

    def _sequence(self, ignore_case: bool) -> Node:
        parts = []
        while self.rest() and self.rest()[0] not in "|)":
            parts.append(self._repeated(self._atom(ignore_case)))
        return Sequence(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        """Read the quantifier behind a part, if there is one."""
        if numbers := _NUMBERS.match(self._pattern, self._at):
            self._at = numbers.end()
            least = int(numbers[1])
            most = (int(numbers[3]) if numbers[3] else None) if numbers[2] else least
        elif self.rest()[:1] in ("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.rest()[0]]
            self._at += 1
        else:
            return part
        # lazy, possessive or twice; more than it is good to write out; or round and round without a character
        if (self.rest()[:1] in ("*", "+", "?", "{") or max(least, most or 0) > MOST_REPEATS
                or (most is not None and most < least) or may_be_empty(part)):
            raise Unsupported(self.rest())
        return Repeat(part, least, most)

    def _atom(self, ignore_case: bool) -> Node:
        for opening, negated in (("(?!", True), ("(?=", False)):
            if self._take(opening):
                look = self.choice(ignore_case)
                if not isinstance(look, Sequence) or len(look.parts) != 1:
                    raise Unsupported(opening)
                (only,) = look.parts
                if not isinstance(only, OneOf):
                    raise Unsupported(opening)
                return self._closed(Next(only.pattern, negated))
        if self._take("(?:"):
            return self._closed(self.choice(ignore_case))
        if self._take("(?i:"):
            start = self._at
            inside = self.choice(ignore_case=True)
            if _folds_together(self._pattern[start : self._at]):
                raise Unsupported("(?i:")
            return self._closed(inside)
        return self._character(ignore_case)

    def _closed(self, node: Node) -> Node:
        if not self._take(")"):
            raise Unsupported(self.rest())
        return node

    def _character(self, ignore_case: bool) -> OneOf:
        """Read what stands for one character."""
        if self.rest()[0] == "[" or _CLASS.match(self._pattern, self._at):
            if ignore_case:
                raise Unsupported(self.rest())
            return OneOf(self._bracket() if self.rest()[0] == "[" else self._match(_CLASS))
        character = self._match(re.compile(r"\\.|.", re.DOTALL))
        if character in _CONTROL:
            return OneOf(_CONTROL[character])
        if character in _SPECIAL or (len(character) > 1 and character[1].isalnum()):
            raise Unsupported(character)
        return OneOf(f"(?i:{character})" if ignore_case and character[-1].isalpha() else character)

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
                raise Unsupported(part)
            depth += part.startswith("[") - (part == "]")
            if not depth:
                return self._pattern[start : self._at]
        raise Unsupported(self._pattern[start:])


def _folds_together(text: str) -> bool:
    """Return whether letters of a text, in either case, are what one other character folds to:
    "ss" and the sharp s."""
    return any(folded in text.casefold() for folded in _long_foldings()) or any(
        len(c.casefold()) > 1 for c in text)


@cache
def _long_foldings() -> frozenset[str]:
    return frozenset(folded for c in range(LAST_LONG_FOLDING + 1) if len(folded := chr(c).casefold()) > 1)
