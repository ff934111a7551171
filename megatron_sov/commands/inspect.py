"""`megatron-sov inspect PATH`: what a folder or file is, who made it from what, and how far."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.runs.inspection import STORE, ArtifactKind, InspectionOptions, inspect_path


@dataclass(frozen=True, kw_only=True)
class InspectOptions(InspectionOptions):
    """Say what a folder or file is, from what it was made, how far unfinished work on it is, and some of its
    rows."""

    path: Annotated[Path, Flag("PATH")]
    """Any artifact, run, rollout store, file of rows, or the --output of a command that was killed."""


def _store_kind() -> ArtifactKind:
    """Return how a rollout store is looked into: its part is needed only where one is met."""
    from megatron_sov.rollouts.inspection import KIND

    return KIND


add_arguments = partial(add_options, cls=InspectOptions)


def run(args: argparse.Namespace) -> int:
    options = read_options(InspectOptions, args)
    store = ArtifactKind(lambda path: _store_kind().lines(path), lambda path: _store_kind().problems(path))
    inspect_path(options.path, options, {STORE: store})
    return ExitCode.OK
