"""Verdicts that several generators need: copied text, sizes, documents in no known language."""

from __future__ import annotations

import numpy as np

from data_prep.synth.generator import GeneratedSample, SampleVerdict
from megatron_sov.base.documents.overlap import find_units


def copied_share(made: str, source: str, words: int) -> float:
    """Return the share of a text's runs of so many words that stand in another one; 0 for a shorter text."""
    runs = find_units(made).runs(words)
    return float(np.isin(runs, find_units(source).runs(words)).mean()) if len(runs) else 0.0


def size_ratio(made: str, source: str) -> float:
    """Return how long a text is, in words, for each word of another one."""
    return find_units(made).size / max(find_units(source).size, 1)


MAX_TOLD_CHARS, MAX_KEPT_CHARS = 200, 2000
"""Of an input that nothing is asked about, and of an answer in another form than the prompt asks for."""


def refused(source: str, check: str, detail: str) -> GeneratedSample:
    """Return the sample of an input about which nothing is asked."""
    return GeneratedSample({"text": source[:MAX_TOLD_CHARS]}, (SampleVerdict(check, False, detail),))


def unknown_language(source: str) -> GeneratedSample:
    """Return the sample of a document in no language that is known."""
    return refused(source, "source language", "not sure, or none")
