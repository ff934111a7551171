"""How much of a text is copied from the one that it was made from."""

from __future__ import annotations

import numpy as np

from megatron_sov.base.documents.overlap import find_units, fold

LETTERS = 3
"""Of a run that short texts are compared by."""


def copied_share(made: str, source: str, words: int) -> float:
    """Return the share of a text's runs of so many words that stand in another one; 0 for a shorter text."""
    runs = find_units(made).runs(words)
    return float(np.isin(runs, find_units(source).runs(words)).mean()) if len(runs) else 0.0


def size_ratio(made: str, source: str) -> float:
    """Return how long a text is, in words, for each word of another one."""
    return find_units(made).size / max(find_units(source).size, 1)


def letters_likeness(one: str, other: str) -> float:
    """Return the Jaccard index of the runs of three letters of two short texts."""
    runs, others = _letter_runs(one), _letter_runs(other)
    return len(runs & others) / max(len(runs | others), 1)


def _letter_runs(text: str) -> set[str]:
    letters = "".join(c for c in fold(text) if c.isalnum())
    return {letters[i:i + LETTERS] for i in range(max(1, len(letters) - LETTERS + 1))}
