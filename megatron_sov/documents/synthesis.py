"""Folders of `sov-data synth`: what of them is a source, and what is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

KEPT, REJECTED = "kept.jsonl", "rejected.jsonl"
"""Samples that passed all checks, and those that did not."""


def is_synthesis(names: Iterable[str]) -> bool:
    """Return whether a folder with such files is one of synthesis, of which `KEPT` alone is data."""
    return {KEPT, REJECTED} <= set(names)


def without_rejected(files: list[Path]) -> list[Path]:
    """Return files without those of folders of synthesis that are no data: what was rejected, and what
    samples were made of."""
    names = set(files)
    folders = {file.parent for file in files if file.name == REJECTED and file.parent / KEPT in names}
    return [file for file in files if (file.name == KEPT and file.parent in folders)
            or folders.isdisjoint(file.parents)]
