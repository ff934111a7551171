"""How many processes a run has; known before torch is imported, so that layouts are checked early."""

from __future__ import annotations

import json
import os
from typing import Any

from megatron_sov.errors import UserError

HANDED = "SOV_HANDED"
"""Environment variable: what a launcher of ours hands to a rank that it starts as a new process, as JSON."""
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
    return os.environ.get("RANK", "0") == "0" and not repeats()


def own_gpu_index(num_gpus: int) -> int:
    """Return this rank's GPU among those that it sees: all of its node, or its own alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) % num_gpus


def repeats() -> bool:
    """Return whether this process is a rank of a launcher of ours that runs the launcher's command again, up
    to the work that it was started for: what it meets on the way the launcher has done and said."""
    return HANDED in os.environ


def handed() -> dict[str, Any]:
    """Return what its launcher has handed to a rank that `repeats`; empty for any other process."""
    found: dict[str, Any] = json.loads(os.environ.get(HANDED, "{}"))
    return found


_results: list[Any] = []


def note_result(result: Any) -> None:
    """Take note of what work on ranks has given, in plain JSON values: ranks that repeat this process's
    command on their way to a later piece of work are handed it."""
    _results.append(result)


def results() -> list[Any]:
    """Return what work on ranks has given in this process so far."""
    return _results


def earlier_result() -> tuple[Any, ...]:
    """Return what the next piece of work has given, alone in a tuple, where the launcher of a rank that
    `repeats` knows it; else an empty tuple."""
    known = handed().get("results", [])[len(_results):]
    _results.extend(known[:1])
    return tuple(known[:1])


def under_launcher() -> bool:
    """Return whether torchrun or Slurm started this process as one rank; it then ends with 0 after a
    stop in good order."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
