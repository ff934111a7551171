"""Hashed n-gram features for linear scorers (feature hashing: Weinberger et al., arXiv 0902.2206).

Lower-case text is split into units: runs of letters, marks and digits in scripts with spaces between words;
single characters in Han, kana, Hangul, Thai and similar scripts; single signs. An n-gram is n units joined by
spaces. scikit-learn's `FeatureHasher` counts n-grams by bucket; a value is 1 + ln(count), and rows are scaled
to length 1. Without a vocabulary, memory does not grow with the data.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import regex
from annotated_types import Ge, Le

from megatron_sov.base.documents.scripts import SCORER_SCRIPTS, list_code_points
from megatron_sov.base.settings import require_that

# Hangul words are separated by spaces but carry many endings: syllable n-grams generalize better.
_SINGLES = "".join(f"\\U{begin:08X}-\\U{end - 1:08X}" for begin, end in list_code_points(SCORER_SCRIPTS))
_UNIT = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}\p{{Cf}}]--[{_SINGLES}\U00020000-\U0010FFFF]]+"
    r"|[\p{L}\p{M}\p{N}\p{P}\p{S}\p{Cf}\p{Co}]")


@dataclass(frozen=True)
class NgramSettings:
    """Settings for `Ngrams`."""

    num_buckets: Annotated[int, Ge(1 << 8), Le(1 << 26), require_that(
        lambda number: number.bit_count() == 1, "must be a power of two", f"e.g. {1 << 18}")] = 1 << 18
    """Hash buckets for n-grams; a power of two."""
    max_ngram: Annotated[int, Ge(1), Le(5)] = 2
    """Units in the longest n-gram."""
    max_chars: Annotated[int, Ge(1), Le(1 << 24)] = 20_000
    """Characters to read from the start of a text."""


class Ngrams:
    """Converts texts to rows of bucket values."""

    def __init__(self, settings: NgramSettings) -> None:
        from sklearn.feature_extraction import FeatureHasher  # optional package

        self.settings = settings
        self._hasher = FeatureHasher(settings.num_buckets, input_type="string", dtype=np.float32,
                                     alternate_sign=False)

    def compute_rows(self, texts: Iterable[str]) -> Any:
        """Return a scipy CSR matrix, float32 [num_texts, num_buckets]."""
        from sklearn.preprocessing import normalize  # optional package

        rows = self._hasher.transform(map(self._list_ngrams, texts))
        # Sublinear: ten occurrences weigh about three times as much as a single occurrence.
        rows.data = 1 + np.log(rows.data)
        return normalize(rows, copy=False)

    def split_text(self, text: str) -> list[str]:
        units: list[str] = _UNIT.findall(text[: self.settings.max_chars].lower())
        return units

    def _list_ngrams(self, text: str) -> list[str]:
        units = self.split_text(text)
        ngrams = list(units)
        for length in range(2, self.settings.max_ngram + 1):
            ngrams += map(" ".join, zip(*(units[start:] for start in range(length)), strict=False))
        return ngrams
