"""`megatron-sov status RUN [RUN ...] [--json | --follow]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import DeclaredCommand, Flag, excludes_field


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show the state of runs."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Run folders, or folders that contain runs."""
    json: Annotated[bool, excludes_field("follow")] = False
    """Print the state of every run as JSON."""
    follow: bool = False
    """Print a line per new step, evaluation, checkpoint and incident until the run ends; for one run."""


STATUS = DeclaredCommand(StatusOptions,
                         run_function="megatron_sov.commands.operate.runs.status_run:show_status",
                         runs_in_checks=True)
