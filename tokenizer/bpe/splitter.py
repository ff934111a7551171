"""Splits text by a preset's pattern: with compiled loops where the pattern has an automaton, else with
Oniguruma."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import normalizers

from tokenizer.bpe.counting import split_words
from tokenizer.bpe.split_pattern import Automaton, UnsupportedPattern, build_automaton, build_splitter
from tokenizer.presets import Preset

PROBE_CHARS = 20_000
"""Text of every unit of work on which the two engines are compared."""


class Splitter:
    """Splits normalised text by one pattern; one per process.

    >>> from tokenizer.presets import PRESETS
    >>> preset = PRESETS["solar-open"]
    >>> Splitter(preset, preset.split_pattern).split("It's 2026.")
    ['It', "'s", ' ', '2', '0', '2', '6', '.']
    """

    def __init__(self, preset: Preset, pattern: str) -> None:
        """Raises: UserError: the pattern does not compile, or can match empty text."""
        self._slow = build_splitter(pattern, preset.name)
        self._normalizer = normalizers.NFC() if preset.normalization == "nfc" else None
        self._automaton: Automaton | None = None
        try:
            self._automaton = build_automaton(pattern)
        except UnsupportedPattern:
            return

    def normalize(self, text: str) -> str:
        return (text if self._normalizer is None or text.isascii()
                else str(self._normalizer.normalize_str(text)))

    def ends(self, raw: bytes) -> NDArray[np.int32]:
        """Return where each piece of normalised text, in UTF-8, ends."""
        # slower by far, and always right
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
        # the same text by both: the fast way is taken on trust of this comparison alone
        if self.split(text) != [piece for piece, _ in self._slow.pre_tokenize_str(text)]:
            self._automaton = None
