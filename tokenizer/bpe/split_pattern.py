"""Parse the split patterns of presets (`tokenizer/presets.py`) and build Oniguruma splitters from them.

The parser reads the part of Oniguruma's syntax that tokenizer patterns use: alternatives, groups without
capture, greedy repetition, character classes, case-insensitive letters, and a lookahead of one character.
Oniguruma itself decides which characters are in a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_sov.base.errors import UserError
from tokenizer.presets import Preset

_CLASS = re.compile(r"\\[pP]\{\^?\w+\}|\\[wdshWDSH]|\.")
_CONTROL = {r"\r": "\r", r"\n": "\n", r"\t": "\t", r"\f": "\f", r"\v": "\v"}
_NUMBERS = re.compile(r"\{(\d+)(,?)(\d*)\}")
_SPECIAL = "\\^$.|?*+()[]{}"
MOST_REPEATS = 100
LAST_LONG_FOLDING = 0xFB17
"""The last character that case-folds to several characters: an Armenian ligature."""
_PROBES = ("", " ", "  ", "\n", "a", "A1 b", "'s 'S 'ſ x", "한국어 1", "e\u0301 \u0e01\u0e33\u0e25 \u3000x",
           "!? \r\n\t z", "\u00a0a \u00a0")


class UnsupportedPattern(Exception):
    """A pattern needs syntax that the parser or the automaton does not support."""


@dataclass(frozen=True)
class CharacterClass:
    """A pattern that matches one character."""

    pattern: str


@dataclass(frozen=True)
class Lookahead:
    """A test of the next character; `negated` also matches at the end of the text."""

    pattern: str
    negated: bool


@dataclass(frozen=True)
class PatternSequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class PatternChoice:
    """Alternatives; the first match wins."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """Greedy repetition; `most` None: no upper limit."""

    part: Node
    least: int
    most: int | None


Node = CharacterClass | Lookahead | PatternSequence | PatternChoice | Repeat


def parse_pattern(pattern: str) -> Node:
    """Parse a pattern. Raises `UnsupportedPattern`: unsupported syntax, or it may match empty text."""
    parser = _Parser(pattern)
    tree = parser.parse_choice(ignore_case=False)
    # such as a closing bracket without an opening bracket
    if parser.rest:
        raise UnsupportedPattern(parser.rest)
    # the automaton does not advance on an empty match
    if may_be_empty(tree):
        raise UnsupportedPattern(pattern)
    return tree


def may_be_empty(node: Node) -> bool:
    """Return whether a node may match without consuming a character."""
    match node:
        case CharacterClass():
            return False
        case Lookahead():
            return True
        case PatternSequence(parts):
            return all(map(may_be_empty, parts))
        case PatternChoice(options):
            return any(map(may_be_empty, options))
        case Repeat(part, least, _):
            return not least or may_be_empty(part)


class _Parser:
    """Recursive descent parser; every method raises `UnsupportedPattern`."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._position = pattern, 0

    @property
    def rest(self) -> str:
        return self._pattern[self._position :]

    def _accept(self, text: str) -> bool:
        """Consume `text` if the pattern continues with it."""
        if not self._pattern.startswith(text, self._position):
            return False
        self._position += len(text)
        return True

    def parse_choice(self, ignore_case: bool) -> Node:
        options = [self._parse_sequence(ignore_case)]
        while self._accept("|"):
            options.append(self._parse_sequence(ignore_case))
        return PatternChoice(tuple(options)) if len(options) > 1 else options[0]

    def _parse_sequence(self, ignore_case: bool) -> Node:
        parts = []
        while self.rest and self.rest[0] not in "|)":
            parts.append(self._parse_quantifier(self._parse_atom(ignore_case)))
        return PatternSequence(tuple(parts))

    def _parse_quantifier(self, part: Node) -> Node:
        if numbers := _NUMBERS.match(self._pattern, self._position):
            self._position = numbers.end()
            least = int(numbers[1])
            most: int | None = least
            if numbers[2]:  # {n,} has no upper limit
                most = int(numbers[3]) if numbers[3] else None
        elif self.rest[:1] in ("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.rest[0]]
            self._position += 1
        else:
            return part
        # lazy, possessive or double quantifiers, large counts, and loops over an empty match
        if (self.rest[:1] in ("*", "+", "?", "{") or max(least, most or 0) > MOST_REPEATS
                or (most is not None and most < least) or may_be_empty(part)):
            raise UnsupportedPattern(self.rest)
        return Repeat(part, least, most)

    def _parse_atom(self, ignore_case: bool) -> Node:
        for opening, negated in (("(?!", True), ("(?=", False)):
            if self._accept(opening):
                content = self.parse_choice(ignore_case)
                if not isinstance(content, PatternSequence) or len(content.parts) != 1:
                    raise UnsupportedPattern(opening)
                (part,) = content.parts
                if not isinstance(part, CharacterClass):
                    raise UnsupportedPattern(opening)
                return self._close_group(Lookahead(part.pattern, negated))
        if self._accept("(?:"):
            return self._close_group(self.parse_choice(ignore_case))
        if self._accept("(?i:"):
            start = self._position
            content = self.parse_choice(ignore_case=True)
            # the automaton reads one character at a time, but Oniguruma folds some characters to two
            if _has_long_folding(self._pattern[start : self._position]):
                raise UnsupportedPattern("(?i:")
            return self._close_group(content)
        return self._parse_character(ignore_case)

    def _close_group(self, node: Node) -> Node:
        if not self._accept(")"):
            raise UnsupportedPattern(self.rest)
        return node

    def _parse_character(self, ignore_case: bool) -> CharacterClass:
        if self.rest[0] == "[" or _CLASS.match(self._pattern, self._position):
            # the members of a class without case depend on the engine's tables
            if ignore_case:
                raise UnsupportedPattern(self.rest)
            return CharacterClass(self._parse_bracket() if self.rest[0] == "[" else self._consume(_CLASS))
        character = self._consume(re.compile(r"\\.|.", re.DOTALL))
        if character in _CONTROL:
            return CharacterClass(_CONTROL[character])
        if character in _SPECIAL or (len(character) > 1 and character[1].isalnum()):
            raise UnsupportedPattern(character)
        return CharacterClass(f"(?i:{character})" if ignore_case and character[-1].isalpha() else character)

    def _consume(self, expression: re.Pattern[str]) -> str:
        match = expression.match(self._pattern, self._position)
        assert match is not None
        self._position = match.end()
        return match[0]

    def _parse_bracket(self) -> str:
        """Consume a character class in brackets, which may contain classes."""
        start, depth = self._position, 0
        while self.rest:
            part = self._consume(re.compile(r"\\.|\[\^?\]?|.", re.DOTALL))
            if part.startswith("[") and part.endswith("]"):
                raise UnsupportedPattern(part)
            if part.startswith("["):
                depth += 1
            elif part == "]":
                depth -= 1
            if not depth:
                return self._pattern[start : self._position]
        raise UnsupportedPattern(self._pattern[start:])


def _has_long_folding(text: str) -> bool:
    """Return whether a text contains the case folding of a single character: "ss" for the sharp s."""
    return any(folding in text.casefold() for folding in _find_long_foldings()) or any(
        len(c.casefold()) > 1 for c in text)


@cache
def _find_long_foldings() -> frozenset[str]:
    foldings = (chr(c).casefold() for c in range(LAST_LONG_FOLDING + 1))
    return frozenset(folding for folding in foldings if len(folding) > 1)


def build_untrained_tokenizer(preset: Preset, pattern: str | None = None) -> Tokenizer:
    """Return a tokenizer with the preset's rules and no vocabulary.

    `pattern`: the split pattern; None: the final pattern of the preset. Raises `UserError`: the pattern is
    not a regular expression, or can match empty text.
    """
    tokenizer = Tokenizer(models.BPE())
    if preset.normalization == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    # use_regex would split again, add_prefix_space would change the text
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = build_splitter(preset.final_pattern if pattern is None else pattern, preset.name)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_splitter(pattern: str, name: str) -> Any:
    """Return Oniguruma's pre-tokenizer. Raises `UserError`: invalid pattern, or it can match empty text."""
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"preset {name}: split pattern {pattern!r} is no regular expression ({e})") from None
    if place := _find_empty_match(pattern):
        raise UserError(f"preset {name}: split pattern {pattern!r} can match empty text ({place}); "
                        "let every alternative take at least one character, e.g. + instead of *")
    return split


def check_coverage(pattern: str, name: str) -> None:
    """Check that a pattern matches every character; tiktoken loses the text between matches. Raises
    `UserError`: the pattern skips a character."""
    text = "".join(map(chr, iter_code_points()))
    # backwards too, after a space that some alternatives need
    for probe in (text, " " + text[::-1]):
        if unmatched := normalizers.Replace(Regex(pattern), "").normalize_str(probe):
            raise UserError(f"preset {name}: split pattern {pattern!r} passes over some text, "
                            f"such as U+{ord(unmatched[0]):04X}; let it match every character, e.g. "
                            "by |[\\s\\S] at its end")


def _find_empty_match(pattern: str) -> str:
    """Return the place of an empty match, or an empty string."""
    try:
        compiled = regex.compile(pattern)
    except regex.error:
        return ""  # valid in Oniguruma alone
    # `tokenizers` does not report empty matches; the module `regex` is close to Oniguruma
    for probe in _PROBES:
        if any(match.start() == match.end() for match in compiled.finditer(probe)):
            return f"in {probe!r}" if probe else "at once"
    return ""


def iter_code_points() -> Iterator[int]:
    """Yield all code points except the inside of large uniform blocks and of planes without characters."""
    for code in range(0x40000):
        # Hangul syllables, private use and Han extension B: the ends of each block represent its inside
        uniform = 0xAC10 <= code < 0xD790 or 0xE010 <= code < 0xF8F0 or 0x20010 <= code < 0x2A000
        if not 0xD800 <= code < 0xE000 and not uniform:
            yield code
    yield from range(0xE0000, 0xE0200)
    yield from (0xF0000, 0xFFFFE, 0x100000, 0x10FFFE)  # private use, and the code points after its ends
