"""Options of `megatron-sov eval` that other commands have too; to import them costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.settings import Flag

if TYPE_CHECKING:
    from megatron_sov.generate.target import Target
    from megatron_sov.runs.append import RunEvents

PARITY_LENGTHS = (1, 7, 64, 200)
"""Tokens of the documents on which two forms of a model are compared."""


ModelPath = Annotated[Path, Flag("TARGET", help="Checkpoint, run (its newest one) or Hugging Face folder.")]


def step_of(target: Target, events: RunEvents) -> int | None:
    """Return the step of a checkpoint; an export is taken to be of the run's last one."""
    return events.last_step() if target.step is None else target.step


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Where figures go beside the terminal."""

    json: bool = False
    """Print the figures as JSON."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the figures to this run's events, for its report."""
