"""Count words and repeated n-grams for the rules.

A word is a run without spaces and punctuation. Runs of punctuation count as separate words, as in the
tokenizers for the published thresholds. In scripts without spaces, and in Korean, whose thresholds were
tuned on morphemes, a character (with its marks) counts as a fraction of a word: this needs no dictionary, and
a word n-gram becomes a proportionally longer character n-gram.
"""

import re
import unicodedata
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.scripts import RULE_SCRIPTS, format_regex_ranges

Unit = Literal["words", "characters"]
SPACELESS = format_regex_ranges(RULE_SCRIPTS)
"""Regex ranges for scripts counted by characters."""
_SPACELESS = re.compile(rf"[{SPACELESS}]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in splitmix64


@lru_cache(maxsize=1)
def list_punctuation() -> frozenset[str]:
    return frozenset(c for c in map(chr, range(0x10000))
                     if (unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~") and c != "_")


@lru_cache(maxsize=2)
def _compile_word_pattern(unit: Unit) -> re.Pattern[str]:
    signs = "".join(map(re.escape, sorted(list_punctuation())))
    if unit == "words":
        return re.compile(rf"[^\s{signs}]+(?:['’.@][^\s{signs}]+|[,:]\d[^\s{signs}]*)*|[{signs}]+")
    marks = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
    return re.compile(rf"[^\s{signs}{SPACELESS}]+|(?![{signs}])[{SPACELESS}][{marks}]*|[{signs}]+")


class RuleWords:
    """Words and punctuation runs in a text, as arrays."""

    def __init__(self, text: str, unit: Unit, chars_per_word: float) -> None:
        """Split `text` by `unit`; `chars_per_word` characters count as a word if `unit` is "characters"."""
        self.scale = chars_per_word if unit == "characters" else 1.0
        """Places per word in `ids`."""
        tokens = _compile_word_pattern(unit).findall(text)
        self.vocabulary = list(dict.fromkeys(tokens))
        """Distinct words by first occurrence."""
        # Words become numbers once, so that array arithmetic replaces loops over words.
        id_by_word = {word: i for i, word in enumerate(self.vocabulary)}
        self.ids = np.array([id_by_word[word] for word in tokens], dtype=np.int64)
        """int64 [num_tokens]: index into `vocabulary`."""
        signs = list_punctuation()
        counts = np.bincount(self.ids, minlength=len(self.vocabulary))
        weights = counts.astype(np.float64)
        if unit == "characters":
            # A character in a spaceless script counts as a fraction of a word.
            weights[[_SPACELESS.match(word) is not None for word in self.vocabulary]] /= chars_per_word
        is_word = np.array([word[0] not in signs for word in self.vocabulary], dtype=bool)
        has_letter = np.array([word.isalpha() or any(map(str.isalpha, word)) for word in self.vocabulary],
                              dtype=bool)
        chars = np.array(list(map(len, self.vocabulary)), dtype=np.int64)
        self.num_tokens = float(weights.sum())
        """Words and punctuation runs."""
        self.num_words = float(weights[is_word].sum())
        """Words without punctuation runs."""
        self.num_alpha = float(weights[has_letter].sum())
        """Words with a letter."""
        self.num_word_chars = int((counts * chars)[is_word].sum())
        """Characters in words, without punctuation runs."""
        self.chars = chars[self.ids]
        """int64 [num_tokens]: characters per word."""
        self._hashes: dict[int, NDArray[np.uint64]] = {}

    @cached_property
    def _chars_before(self) -> NDArray[np.int64]:
        """int64 [num_tokens + 1]: characters before each place."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.chars)])

    def count_places(self, num_words: int) -> int:
        return max(round(num_words * self.scale), 1)

    def _hash_ngrams(self, n: int) -> NDArray[np.uint64]:
        """Hash the n places from each place on: uint64 [num_tokens - n + 1]."""
        if n not in self._hashes:
            if n == 1:
                seed = np.arange(1, len(self.vocabulary) + 1, dtype=np.uint64) * _FACTOR
                self._hashes[n] = _mix_bits(seed)[self.ids]
            else:
                # Combine the hashes of two halves: log2(n) passes, and other n reuse the halves. The factor
                # makes the hash depend on their order.
                left, right = self._hash_ngrams(n // 2), self._hash_ngrams(n - n // 2)
                length = max(len(self.ids) - n + 1, 0)
                self._hashes[n] = _mix_bits(left[:length] * _FACTOR + right[n // 2:n // 2 + length])
        return self._hashes[n]

    def count_top_ngram_chars(self, num_words: int) -> int:
        """Count the characters that the most frequent n-gram covers, its words joined by spaces.

        Ties go to the first n-gram in the text.
        """
        n = self.count_places(num_words)
        hashes = self._hash_ngrams(n)
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
        """Count the characters in repeated n-grams, each character once.

        A walk from the start jumps over every n-gram seen earlier. If an upper bound is at most `enough`,
        return the bound without the walk.
        """
        n = self.count_places(num_words)
        hashes = self._hash_ngrams(n)
        ordered = np.sort(hashes)
        # Most texts repeat no long n-gram and return here after a sort.
        if not np.any(ordered[1:] == ordered[:-1]):
            return 0
        order = np.argsort(hashes, kind="stable")
        equals_previous = hashes[order][1:] == hashes[order][:-1]
        repeated = np.zeros(len(hashes), dtype=bool)
        repeated[order[1:][equals_previous]] = repeated[order[:-1][equals_previous]] = True
        # +1 at the begin and -1 after the end of each repeated n-gram: the running sum is positive at covered
        # places. Their characters bound the walk's count from above.
        bounds = np.zeros(len(self.ids) + 1, np.int64)
        bounds[:len(hashes)] += repeated
        bounds[n:n + len(hashes)] -= repeated
        most = int(self.chars[np.cumsum(bounds[:-1]) > 0].sum())
        return most if most <= enough else self._count_repeated_chars(hashes, repeated, n)

    def _count_repeated_chars(self, hashes: NDArray[np.uint64], repeated: NDArray[np.bool_], n: int) -> int:
        places = np.flatnonzero(repeated).tolist()
        seen: set[int] = set()
        total, free_from, before = 0, 0, self._chars_before
        for place, value in zip(places, hashes[places].tolist(), strict=True):
            # The n-gram before covered this place.
            if place < free_from:
                continue
            if value in seen:
                total += int(before[place + n] - before[place])
                free_from = place + n
            else:
                seen.add(value)
        return total


def _mix_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
