"""Words of a text, and how much of it repeats: what the rules measure.

A word is a run of signs that are neither spaces nor punctuation; runs of punctuation are counted as words of
their own, as by the tokenizers that the thresholds were found with.  Where words are not set apart by spaces,
and in Korean, whose thresholds were found on morphemes, each character of the script (with its marks) counts
as a share of a word: no dictionary is needed, and an n-gram of words is one of n times as many characters.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.scripts import RULE_SCRIPTS, format_regex_ranges

Unit = Literal["words", "characters"]
SPACELESS = format_regex_ranges(RULE_SCRIPTS)
"""Ranges of the scripts whose characters are counted."""
_SPACELESS = re.compile(rf"[{SPACELESS}]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=1)
def list_punctuation() -> frozenset[str]:
    return frozenset(c for c in map(chr, range(0x10000))
                     if (unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~") and c != "_")


@lru_cache(maxsize=2)
def _pattern(unit: Unit) -> re.Pattern[str]:
    signs = "".join(map(re.escape, sorted(list_punctuation())))
    if unit == "words":
        return re.compile(rf"[^\s{signs}]+(?:['’.@][^\s{signs}]+|[,:]\d[^\s{signs}]*)*|[{signs}]+")
    marks = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
    return re.compile(rf"[^\s{signs}{SPACELESS}]+|(?![{signs}])[{SPACELESS}][{marks}]*|[{signs}]+")


class RuleWords:
    """The words of one text."""

    def __init__(self, text: str, unit: Unit, chars_per_word: float) -> None:
        """Cut a text.

        Args:
            unit: `words` by spaces and punctuation, or `characters`.
            chars_per_word: characters that count as one word, where `unit` is `characters`.
        """
        self.scale = chars_per_word if unit == "characters" else 1.0
        """Characters that count as one word."""
        tokens = _pattern(unit).findall(text)
        self.vocabulary = list(dict.fromkeys(tokens))
        """The different words, in the order in which they occur first."""
        # Words become numbers once: all that follows is arithmetic on arrays, and not a loop per word.
        number = dict(zip(self.vocabulary, range(len(self.vocabulary)), strict=True))
        self.ids = np.array(list(map(number.__getitem__, tokens)), dtype=np.int64)
        """int64 [num_tokens]: word of each place, as its number in the vocabulary."""
        signs = list_punctuation()
        counts = np.bincount(self.ids, minlength=len(number))
        weights = counts.astype(np.float64)
        if unit == "characters":
            # A character of a spaceless script counts as its share of a word.
            weights[[_SPACELESS.match(word) is not None for word in self.vocabulary]] /= chars_per_word
        is_word = np.array([word[0] not in signs for word in self.vocabulary], dtype=bool)
        has_letter = np.array([word.isalpha() or any(map(str.isalpha, word)) for word in self.vocabulary],
                              dtype=bool)
        chars = np.array(list(map(len, self.vocabulary)), dtype=np.int64)
        self.num_tokens = float(weights.sum())
        """Words and runs of punctuation."""
        self.num_words = float(weights[is_word].sum())
        """Words."""
        self.num_alpha = float(weights[has_letter].sum())
        """Words with a letter."""
        self.num_word_chars = int((counts * chars)[is_word].sum())
        """Characters of the words."""
        self.chars = chars[self.ids]
        """int64 [num_tokens]: characters of each word."""
        self._hashes: dict[int, NDArray[np.uint64]] = {}

    @cached_property
    def _chars_before(self) -> NDArray[np.int64]:
        """int64 [num_tokens + 1]: characters of the words before each place."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.chars)])

    def size(self, num_words: int) -> int:
        """Return how many places an n-gram of so many words has."""
        return max(round(num_words * self.scale), 1)

    def hashes(self, n: int) -> NDArray[np.uint64]:
        """Return the hash of the n places from each place on: uint64 [num_tokens - n + 1]."""
        if n not in self._hashes:
            if n == 1:
                seed = np.arange(1, len(self.vocabulary) + 1, dtype=np.uint64) * _FACTOR
                self._hashes[n] = _mixed(seed)[self.ids]
            else:
                # The hash of n places from those of two halves: log2(n) passes, and the halves are kept for
                # other n. The factor makes the order of the halves count.
                left, right = self.hashes(n // 2), self.hashes(n - n // 2)
                length = max(len(self.ids) - n + 1, 0)
                self._hashes[n] = _mixed(left[:length] * _FACTOR + right[n // 2:n // 2 + length])
        return self._hashes[n]

    def count_top_ngram_chars(self, num_words: int) -> int:
        """Return the characters that the most frequent n-gram covers, its words joined by spaces; of equally
        frequent ones the first."""
        n = self.size(num_words)
        hashes = self.hashes(n)
        if not len(hashes):
            return 0
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], hashes[order][1:] != hashes[order][:-1]]))
        counts = np.diff(starts, append=len(order))
        most = int(counts.max())
        # The sort is stable, so a run begins with its first place in the text.
        first = int(order[starts[counts == most]].min())
        # n - 1 spaces join the words of an n-gram.
        return (int(self._chars_before[first + n] - self._chars_before[first]) + num_words - 1) * most

    def count_duplicate_ngram_chars(self, num_words: int, enough: float) -> int:
        """Return the characters in n-grams that occurred before, none counted twice.

        The text is walked from its beginning; at an n-gram that occurred before, the walk goes on behind its
        last word.  A count that cannot be more than `enough` is returned as an upper bound.
        """
        n = self.size(num_words)
        hashes = self.hashes(n)
        ordered = np.sort(hashes)
        # Most texts repeat no long n-gram, and end here after one sort.
        if not np.any(ordered[1:] == ordered[:-1]):
            return 0
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        repeated = np.zeros(len(hashes), dtype=bool)
        repeated[order[1:][same]] = repeated[order[:-1][same]] = True
        # Where an n-gram repeats, +1 at its begin and -1 behind its end: the running sum is above zero on
        # every place that one covers. Their characters bound the walk's count from above.
        bounds = np.zeros(len(self.ids) + 1, np.int64)
        bounds[:len(hashes)] += repeated
        bounds[n:n + len(hashes)] -= repeated
        most = int(self.chars[np.cumsum(bounds[:-1]) > 0].sum())
        return most if most <= enough else self._walk(hashes, repeated, n)

    def _walk(self, hashes: NDArray[np.uint64], repeated: NDArray[np.bool_], n: int) -> int:
        places = np.flatnonzero(repeated).tolist()
        seen: set[int] = set()
        total, free_from, before = 0, 0, self._chars_before
        for place, value in zip(places, hashes[places].tolist(), strict=True):
            # Its words were counted with the n-gram before.
            if place < free_from:
                continue
            if value in seen:
                total += int(before[place + n] - before[place])
                free_from = place + n
            else:
                seen.add(value)
        return total


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well spread 64-bit values (the finalizer of splitmix64; Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
