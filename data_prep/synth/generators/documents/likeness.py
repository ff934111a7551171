"""How much of a text is copied from the one that it was made from."""

from __future__ import annotations

import numpy as np

from data_prep.synth.sample import Verdict
from megatron_sov.documents.overlap import find_units


def copied_share(made: str, source: str, words: int) -> float:
    """Return the share of a text's runs of so many words that stand in another one; 0 for a shorter text."""
    runs = find_units(made).runs(words)
    return float(np.isin(runs, find_units(source).runs(words)).mean()) if len(runs) else 0.0


def size_ratio(made: str, source: str) -> float:
    """Return how long a text is, in words, for each word of another one."""
    return find_units(made).size / max(find_units(source).size, 1)


def bounds_verdict(check: str, value: float, least: float, most: float) -> Verdict:
    """Return whether a figure lies within bounds."""
    return Verdict(check, least <= value <= most, f"{value:.2f}, must lie from {least:g} to {most:g}")
