"""Inputs and state of a training stage, shared by its launcher and its ranks."""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.model.config import RunConfig
from megatron_sov.model.process_memory import MemoryEstimate
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.sources import Source
from megatron_sov.train.feed import Feed
from megatron_sov.train.guards.fault_injection import Fault
from megatron_sov.train.guards.gate import Gate, GateView
from megatron_sov.train.trainer import ObjectiveFactory


@dataclass(frozen=True)
class Stage:
    """Inputs and hooks for a training stage, such as pretraining or one stage of an extension."""

    config: RunConfig
    folder: RunFolder
    objective: ObjectiveFactory
    start_from: Path | None = None
    """Checkpoint with start weights (dry run: or a Hugging Face folder); default: initial weights."""
    resume: bool = False
    """Whether to continue a run that is already in `folder`."""
    sources: tuple[Source, ...] | None = None
    """Sources in `config.data.paths`; opened by `run_stage` by default."""
    extra_sources: tuple[Source, ...] = ()
    """Sources whose documents are built in memory or during the run."""
    extra_inputs: tuple[dict[str, str], ...] = ()
    """Artifacts in addition to data and start (`describe_input`), for the records."""
    before: Callable[[GateView], object] | None = None
    """Called on every rank before a new run's first step."""
    after: Callable[[GateView], dict[str, Any]] | None = None
    """Called on every rank after the last step; returns fields for the completion manifest."""
    gate: Gate | None = None
    """Judges the model during training; must pass before the stage is complete."""
    feed: Feed | None = None
    """Supplies data that appear during the run."""
    faults: tuple[Fault, ...] = ()
    """Faults to inject."""
    until: int | None = None
    """Step after which the run stops early; default: train to the last step."""
    dry_run: bool = False
    """Whether to check and describe the stage without running it."""
    notes: tuple[str, ...] = ()
    """Automatically chosen defaults, with reasons."""
    memory: MemoryEstimate | None = None
    """Predicted memory, for the banner and for checking each GPU's free memory."""


@dataclass(frozen=True)
class StageData:
    """Training data, opened once and inherited by forked ranks."""

    sources: list[Source]
    """Sources, with views and `Stage.extra_sources`."""
    planned: list[LedgerEntry]
    """Entries from `plan_ledger`."""


@dataclass
class LaunchState:
    """Launcher state, inherited by the ranks."""

    time_s: float
    """Unix time."""
    may_resume: bool
    """Whether the folder may already contain the run."""
    restarts: list[dict[str, Any]] = field(default_factory=list)
    """`restart` events from before the folder contained the run, to be written when its records open."""
    shared: int = field(default_factory=lambda: _create_shared_byte())
    """File descriptor for `declared`; -1: only forked ranks share it."""
    declared: mmap.mmap = field(init=False)
    """One byte shared with the ranks: 1 once the folder contains this run."""

    def __post_init__(self) -> None:
        self.declared = mmap.mmap(self.shared, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return LaunchState, (self.time_s, self.may_resume, self.restarts, self.shared)


def _create_shared_byte() -> int:
    """Create a memory file of one byte, which new processes inherit; return -1 if not supported."""
    if not hasattr(os, "memfd_create"):
        return -1
    file = os.memfd_create("declared", 0)
    os.truncate(file, 1)
    return file
