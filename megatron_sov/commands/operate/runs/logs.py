"""`megatron-sov logs RUN [--rank N] [--tail N] [--follow]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegativeInt


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Print and follow a run's logs."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    rank: tuple[int, ...] = ()
    """Only lines from this rank, in all its starts; may be repeated."""
    tail: NotNegativeInt = 0
    """Only the last N lines per file (default: all)."""
    follow: bool = False
    """Follow new lines until the run ends."""


LOGS = DeclaredCommand(LogsOptions, run_function="megatron_sov.commands.operate.runs.logs_run:print_logs",
                       runs_in_checks=True)
