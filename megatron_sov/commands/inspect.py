"""`megatron-sov inspect PATH`: what a folder or file is, who made it from what, and how far."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.errors import ExitCode
from megatron_sov.runs.inspecting import STORE, Kind, LookOptions, look
from megatron_sov.settings import Flag, add_options, read_options


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
    look(options.path, options, {STORE: Kind(_store_lines, _store_problems)})
    return ExitCode.OK


def _store_lines(path: Path) -> Iterator[str]:
    from megatron_sov.commands.rl_store import listed
    from megatron_sov.rollouts.store import Store

    return listed(Store.open(path))


def _store_problems(path: Path) -> list[str]:
    from megatron_sov.rollouts.checking import check
    from megatron_sov.rollouts.store import Store

    return check(Store.open(path), lambda parts: None).problems
