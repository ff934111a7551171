"""Options of `sov-data inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.runs.inspection import InspectionOptions


@dataclass(frozen=True, kw_only=True)
class DataInspectOptions(InspectionOptions):
    """Show kind, origin and progress of a path, and some rows.

    For output of `sov-data run`: documents that each step kept, changed and dropped, with reasons, and
    samples of dropped documents."""

    data: Annotated[Path, Flag("PATH")]
    """Any artifact, file with rows, or a killed command's --output."""


INSPECT = DeclaredCommand(DataInspectOptions, run_function="data_prep.curate.inspect_run:inspect_data")
