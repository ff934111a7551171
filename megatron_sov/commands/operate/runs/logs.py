"""`megatron-sov logs RUN [--rank N] [--tail N] [--follow]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegativeInt


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Print the logs of runs, and follow them."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    rank: tuple[int, ...] = ()
    """Only what this rank wrote, in all its starts; may be given several times."""
    tail: NotNegativeInt = 0
    """Only the last N lines of each file (default: all)."""
    follow: bool = False
    """Go on with new lines until the run has ended."""


LOGS = DeclaredCommand(LogsOptions, run_function="megatron_sov.commands.operate.runs.logs_run:print_logs",
                       runs_in_checks=True)
