"""Options of `megatron-sov eval` that other commands have too; to import them costs nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.settings import Flag

PARITY_LENGTHS = (1, 7, 64, 200)
"""Tokens of the documents on which two forms of a model are compared."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Where figures go beside the terminal."""

    json: bool = False
    """Print the figures as JSON."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the figures to this run's events, for its report."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How the side that is a checkpoint runs."""

    nproc: int | None = None
    """Local processes (checkpoints)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Layout and precision, e.g. --set parallel.ep=2 --set train.precision=bf16 (checkpoints)."""


def with_record(sub: argparse.ArgumentParser) -> None:
    """Declare where the figures go beside the terminal."""
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")
    sub.add_argument("--run", type=Path, metavar="DIR",
                     help="also add the figures to this run's events, for its report")


def with_ranks(sub: argparse.ArgumentParser) -> None:
    """Declare how the side that is a checkpoint runs."""
    sub.add_argument("--nproc", type=int, default=None, metavar="N", help="local processes (checkpoints)")
    sub.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value",
                     help="layout and precision, e.g. --set parallel.ep=2 --set "
                          "train.precision=bf16 (checkpoints)")
