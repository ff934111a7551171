"""Splitting text into the units within which bytes merge: as `tokenizers` does, many times as fast.

A finished tokenizer splits by Oniguruma.  Where the pattern can be read, text is split by an automaton in
compiled code instead (tokenizer/bpe/split_automaton.py), which takes from Oniguruma what the classes of
characters hold; else by Oniguruma itself, and so too when the two are seen to differ.  The result therefore
never depends on which of them did the work.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.errors import UserError
from tokenizer.presets import Preset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBE_CHARS = 20_000
"""Text of every unit of work on which the two engines are compared."""
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

    from tokenizer.bpe.split_automaton import code_points

    text = "".join(map(chr, code_points()))
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
        from tokenizers import normalizers

        from tokenizer.bpe.split_automaton import Automaton, automaton
        from tokenizer.bpe.split_pattern import Unsupported

        self._slow = oniguruma(pattern, preset.name)
        self._normalizer = normalizers.NFC() if preset.normalization == "nfc" else None
        self._automaton: Automaton | None = None
        try:
            self._automaton = automaton(pattern)
        except Unsupported:
            return

    def normalize(self, text: str) -> str:
        """Return text in the form in which it is split."""
        return (text if self._normalizer is None or text.isascii()
                else str(self._normalizer.normalize_str(text)))

    def ends(self, raw: bytes) -> NDArray[np.int32]:
        """Return where each piece of normalised text, in UTF-8, ends."""
        from tokenizer.bpe.counting import split_words

        if self._automaton is None:
            pieces = self._slow.pre_tokenize_str(raw.decode())
            return np.cumsum([len(piece.encode()) for piece, _ in pieces], dtype=np.int32)
        found = np.empty(len(raw), np.int32)
        kinds, steps = self._automaton.kinds, self._automaton.steps
        return found[: split_words(np.frombuffer(raw, np.uint8), kinds, steps, found)]

    def split(self, text: str) -> list[str]:
        """Return the pieces of normalised text; joined they are the text."""
        raw, ends = text.encode(), [0, *self.ends(text.encode()).tolist()]
        return [raw[start:end].decode() for start, end in pairwise(ends)]

    def check(self, text: str) -> None:
        """Compare the engines on some text, and from a difference on use Oniguruma alone."""
        text = text[:PROBE_CHARS]
        if self.split(text) != [piece for piece, _ in self._slow.pre_tokenize_str(text)]:
            self._automaton = None
