"""How many processes a run has; known before torch is imported, so that layouts are checked early."""

from __future__ import annotations

import os

from megatron_sov.base.errors import UserError

MOST_LOCAL_RANKS = 4096
"""More are a slip of the hand, on whatever machine."""


def num_ranks(nproc: int | None) -> int:
    """Return how many processes the run will have: the environment's under torchrun or Slurm,
    else `nproc` (default 1)."""
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}: must be at least 1")
    if nproc is not None and nproc > MOST_LOCAL_RANKS:
        raise UserError(f"--nproc {nproc}: must be at most {MOST_LOCAL_RANKS:,}")
    return int(os.environ["WORLD_SIZE"]) if under_launcher() else nproc or 1


def is_first() -> bool:
    """Return whether this process is rank 0, or no rank: the one that speaks for all;
    needs no process groups."""
    return os.environ.get("RANK", "0") == "0"


def own_gpu_index(num_gpus: int) -> int:
    """Return this rank's GPU among those that it sees: all of its node, or its own alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) % num_gpus


def under_launcher() -> bool:
    """Return whether torchrun or Slurm started this process as one rank; it then ends with 0 after a
    stop in good order."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
