"""Options that several commands have; to import them costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.settings import Flag

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.runs.folder import RunEvents

PARITY_LENGTHS = (1, 7, 64, 200)
"""Tokens of the documents on which two forms of a model are compared."""
ModelPath = Annotated[Path, Flag("TARGET", help="Checkpoint, run (its newest one) or Hugging Face folder.")]
AnyTarget = Annotated[str, Flag("TARGET", help="Checkpoint, run (its newest one), Hugging Face folder, or "
                                               "the address of an OpenAI-compatible endpoint, up to /v1.")]
CheckpointPath = Annotated[Path, Flag("CHECKPOINT", help="Checkpoint, or run (its newest one).")]
CheckpointOut = Annotated[Path, Flag("OUT", help="Checkpoint folder to write.")]


@dataclass(frozen=True, kw_only=True)
class OverwriteOptions:
    """What commands take that write a file or a folder."""

    overwrite: bool = False
    """Replace what is already there, where it is of the same kind."""


@dataclass(frozen=True, kw_only=True)
class RedoOptions:
    """What commands take that go on behind a kill."""

    redo: bool = False
    """Begin anew where unfinished work on the output was asked for otherwise."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Where figures go beside the terminal."""

    json: bool = False
    """Print the figures as JSON."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the figures to this run's events, for its report."""


def step_of(target: Target, events: RunEvents) -> int | None:
    """Return the step of a checkpoint; an export is taken to be of the run's last one."""
    return events.last_step() if target.step is None else target.step
