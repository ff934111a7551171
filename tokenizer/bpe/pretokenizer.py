"""Splitting text into the units within which bytes merge: as `tokenizers` does,
several times as fast where that is proven.

A finished tokenizer splits by Oniguruma.  Python's `regex` does the same faster, but knows a newer Unicode:
text with a character that the two put into different classes is left to Oniguruma, and so is all text of a
pattern on which the two are seen to differ.  ASCII text is split by Python's own `re`, twice as fast again,
where the pattern can be written for it.  The result therefore never depends on which of them did the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from megatron_sov.errors import UserError
from tokenizer.presets import Preset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBE_CHARS = 20_000
"""Text of every unit of work on which the two engines are compared."""
LAST_IN_TABLE = "\uffff"
BEYOND_TABLE = re.compile("[\U00010000-\U0010ffff]")
_CLASSES = re.compile(r"\\[pP]\{\^?\w+\}|\\[wdshWDSH]")
_PARTS = re.compile(r"\\[pP]\{[^}]*\}|\\.|.", re.DOTALL)
_ASCII = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\p{M}": "", r"\s": r"\t-\r "}
"""What classes come to in ASCII, inside brackets; `re` itself would take four control
characters for white space."""
_NEGATED = {r"\P{L}": r"\p{L}", r"\P{N}": r"\p{N}", r"\S": r"\s"}
_CONTROL = (r"\r", r"\n", r"\t", r"\f", r"\v")
_PROBES = ("", " ", "  ", "\n", "a", "A1 b", "'s 'S 'ſ x", "한국어 1", "e\u0301 \u0e01\u0e33\u0e25 \u3000x",
           "!? \r\n\t z", "\u00a0a \u00a0")


def untrained(preset: Preset, pattern: str | None = None) -> Tokenizer:
    """Return a tokenizer with the preset's rules and no vocabulary; `pattern`:
    another split than the final one.

    Raises:
        UserError: the split pattern is not a regular expression, or matches empty text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    if preset.normalization == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    # use_regex=False: the split is the only one; add_prefix_space would change the text
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = oniguruma(preset.final_pattern if pattern is None else pattern, preset.name)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def oniguruma(pattern: str, name: str) -> Any:
    """Return the pre-tokenizer that splits by a pattern.

    Raises:
        UserError: the pattern does not compile, or can match empty text.
    """
    from tokenizers import Regex, pre_tokenizers

    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"preset {name}: split pattern {pattern!r} is no regular expression ({e})") from None
    if found := _matches_empty(pattern):
        raise UserError(f"preset {name}: split pattern {pattern!r} can match empty text ({found}); "
                        "let every alternative take at least one character, e.g. + instead of *")
    return split


def check_coverage(pattern: str, name: str) -> None:
    """Check that a pattern passes over no character: tiktoken, unlike `tokenizers`, would lose it.

    Raises:
        UserError: it does.
    """
    from tokenizers import Regex, normalizers

    text = "".join(map(chr, _code_points()))
    for probe in (text, " " + text[::-1]):
        if left := normalizers.Replace(Regex(pattern), "").normalize_str(probe):
            raise UserError(f"preset {name}: split pattern {pattern!r} passes over some text, "
                            f"such as U+{ord(left[0]):04X}; let it match every character, e.g. "
                            "by |[\\s\\S] at its end")


def _matches_empty(pattern: str) -> str:
    """Return where a pattern matches no character, or an empty string."""
    import regex

    try:
        compiled = regex.compile(pattern)
    except regex.error:
        return ""  # Oniguruma alone knows the pattern; the splits that it gives are what counts
    for probe in _PROBES:
        if any(match.start() == match.end() for match in compiled.finditer(probe)):
            return f"in {probe!r}" if probe else "at once"
    return ""


class Splitter:
    """Splits normalised text by one pattern; one per process."""

    def __init__(self, preset: Preset, pattern: str) -> None:
        """Raises: UserError: the pattern does not compile, or can match empty text."""
        import regex
        from tokenizers import normalizers

        self._slow = oniguruma(pattern, preset.name)
        self._normalizer = normalizers.NFC() if preset.normalization == "nfc" else None
        self._findall: Callable[[str], list[str]] = self._split_slowly
        self._findall_ascii: Callable[[str], list[str]] = self._split_slowly
        try:
            compiled = regex.compile(pattern)
            if compiled.groups:  # findall would give the groups
                return
            disputed = disputed_characters(pattern)
            # one table for the 65,536 characters of two bytes is fast; in a mixed class `re` would go
            # through all ranges
            in_table = sorted(re.escape(c) for c in disputed if c < LAST_IN_TABLE)
            self._disputed = re.compile(f"[{''.join(in_table)}{LAST_IN_TABLE}]")
            self._disputed_beyond = frozenset(c for c in disputed if c > LAST_IN_TABLE)
            self._findall = self._findall_ascii = compiled.findall
            self._findall_ascii = re.compile(ascii_pattern(pattern), re.ASCII).findall
        except (regex.error, re.error, NoAsciiForm):
            return

    def normalize(self, text: str) -> str:
        """Return text in the form in which it is split."""
        return (text if self._normalizer is None or text.isascii()
                else str(self._normalizer.normalize_str(text)))

    def split(self, text: str) -> list[str]:
        """Return the pieces of normalised text; joined they are the text."""
        if text.isascii():
            pieces = self._findall_ascii(text)
        elif self._findall == self._split_slowly or self._is_disputed(text):
            return self._split_slowly(text)
        else:
            pieces = self._findall(text)
        # text between matches counts too
        return pieces if len("".join(pieces)) == len(text) else self._split_slowly(text)

    def _is_disputed(self, text: str) -> bool:
        return bool(self._disputed.search(text)) or (
            BEYOND_TABLE.search(text) is not None and not self._disputed_beyond.isdisjoint(text))

    def check(self, text: str) -> None:
        """Compare the engines on some text, and from a difference on use Oniguruma alone."""
        text = text[:PROBE_CHARS]
        if self.split(text) != self._split_slowly(text):
            self._findall = self._findall_ascii = self._split_slowly

    def _split_slowly(self, text: str) -> list[str]:
        return [piece for piece, _ in self._slow.pre_tokenize_str(text)]


class NoAsciiForm(Exception):
    """A pattern uses something that has no sure counterpart in `re`."""


def ascii_pattern(pattern: str) -> str:
    """Return a pattern for `re` that splits ASCII text as `pattern` does.

    Raises:
        NoAsciiForm: it uses more than letters, marks, numbers and white space as classes.
    """
    parts, in_class = [], False
    for part in _PARTS.findall(pattern):
        if part in ("[", "]"):
            if in_class == (part == "["):
                raise NoAsciiForm(part)
            in_class = not in_class
        elif part.startswith("\\"):
            negated = part in _NEGATED
            content = _ASCII.get(_NEGATED.get(part, part))
            if (content is None and part[1:2].isalnum() and part not in _CONTROL) or (negated and in_class):
                raise NoAsciiForm(part)
            if content is not None:
                part = content if in_class else f"[{'^' if negated else ''}{content}]" if content else "(?!)"
        parts.append(part)
    text = "".join(parts)
    if re.search(r"\(\?!\)\*[+?]", text):
        raise NoAsciiForm(pattern)
    return text.replace("(?!)*", "")  # any number of what there is none of


@lru_cache(maxsize=8)
def disputed_characters(pattern: str) -> frozenset[str]:
    """Return the characters that the two engines put into different classes of a pattern."""
    import regex
    from tokenizers import Regex, normalizers

    text = "".join(map(chr, _code_points()))
    disputed: set[str] = set()
    for class_ in sorted(set(_CLASSES.findall(pattern))):
        fast = set(regex.findall(class_, text))
        slow = set(text) - set(normalizers.Replace(Regex(class_), "").normalize_str(text))
        disputed |= fast ^ slow
    return frozenset(disputed)


def _code_points() -> Iterator[int]:
    """Yield all code points except the inside of large blocks that are of one kind,
    and of planes without characters."""
    for code in range(0x40000):
        uniform = 0xAC10 <= code < 0xD790 or 0xE010 <= code < 0xF8F0 or 0x20010 <= code < 0x2A000
        if not 0xD800 <= code < 0xE000 and not uniform:
            yield code
    yield from range(0xE0000, 0xE0200)
