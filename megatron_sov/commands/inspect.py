"""`megatron-sov inspect PATH`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.command_line import import_reference
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.runs.inspection import STORE, ArtifactKind, InspectionOptions, inspect_path

STORE_KIND = "megatron_sov.rollouts.inspection:KIND"
"""`ArtifactKind` for rollout stores, imported only for a rollout store."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(InspectionOptions):
    """Show the kind, inputs and sample rows of a folder or file, and the progress of unfinished work."""

    path: Annotated[Path, Flag("PATH")]
    """Any artifact, run, rollout store or row file, or the --output path from an interrupted command."""


def show_path(options: InspectOptions) -> None:
    store = ArtifactKind(lambda path: import_reference(STORE_KIND).lines(path),
                         lambda path: import_reference(STORE_KIND).problems(path))
    inspect_path(options.path, options, {STORE: store})


INSPECT = DeclaredCommand(InspectOptions, show_path)
