"""Which artifact a file or folder of text belongs to."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.errors import UserError

CORPUS, SYNTHESIS = "corpus", "synthesis"
"""Kinds of what `sov-data run` and `sov-data synth` write."""


def artifact_of(path: Path) -> Path | None:
    """Return the corpus, or the folder of synthesis, that a path is, or lies in; None where there is no
    complete one."""
    for folder in (path, *path.absolute().parents):
        if (folder / MANIFEST).is_file():
            try:
                return folder if read_manifest(folder).kind in (CORPUS, SYNTHESIS) else None
            except UserError:
                return None
    return None
