"""`megatron-sov inspect PATH`: what a folder or file is, who made it from what, and how far."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.commands.rl.rl_store import KIND
from megatron_sov.runs.inspecting import STORE, LookOptions, look


@dataclass(frozen=True, kw_only=True)
class InspectOptions(LookOptions):
    """Say what a folder or file is, from what it was made, how far unfinished work on it is, and some of its
    rows."""

    path: Annotated[Path, Flag("PATH")]
    """Any artifact, run, rollout store, file of rows, or the --output of a command that was killed."""


add_arguments = partial(add_options, cls=InspectOptions)


def run(args: argparse.Namespace) -> int:
    """Print what is known."""
    options = read_options(InspectOptions, args)
    look(options.path, options, {STORE: KIND})
    return ExitCode.OK
