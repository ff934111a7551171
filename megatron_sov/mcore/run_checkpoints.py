"""The checkpoints of a run: which one is the newest, and which ones stay.  No torch here."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.errors import UserError

KIND = "checkpoint"
CHECKPOINTS_OF_A_RUN = "checkpoints"


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run's `checkpoints` folder, or None."""
    complete = [(step, path) for step, path in _steps(folder) if (path / MANIFEST).is_file()]
    return complete[-1][1] if complete else None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(p.name[5:]), p) for p in folder.glob("step-*") if p.name[5:].isdigit())


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest one of a run folder.

    Raises:
        UserError: it is neither.
    """
    if (path / CHECKPOINTS_OF_A_RUN).is_dir():
        newest = latest(path / CHECKPOINTS_OF_A_RUN)
        if newest is None:
            raise UserError(f"{path}: this run has no complete checkpoint yet")
        return newest
    read_manifest(path, KIND)
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all)."""
    for _, path in _steps(folder)[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
