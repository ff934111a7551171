"""Folders of `sov-data synth`: what of them is a source, and what is not."""

from __future__ import annotations

from collections.abc import Iterable

KEPT, REJECTED = "kept.jsonl", "rejected.jsonl"
"""Samples that passed all checks, and those that did not."""


def is_synthesis(names: Iterable[str]) -> bool:
    """Return whether a folder with such files is one of synthesis, of which `KEPT` alone is data."""
    return {KEPT, REJECTED} <= set(names)
