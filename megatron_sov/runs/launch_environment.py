"""How many processes a run has and when this one started; known before torch is imported, so that layouts are
checked early."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from megatron_sov.base.errors import UserError

STARTTIME = 22
"""Field of /proc/PID/stat, from 1: clock ticks from the start of the machine to that of the process."""


def process_started_s() -> float:
    """Return the Unix time at which this process started, to a clock tick (10 ms).

    On Linux it is reckoned back from now by the age of the process, so it is right after the clock was set;
    elsewhere the system keeps the time itself.
    """
    # psutil adds ticks to the machine's start, which Linux tells in whole seconds
    if sys.platform == "linux":
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as f:
            after_name = f.read().rpartition(")")[2].split()  # the name, field 2, may hold anything
        started_s = int(after_name[STARTTIME - 3]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    import psutil

    return psutil.Process().create_time()


COMMAND_VARIABLE = "MEGATRON_SOV_COMMAND"
"""Of the environment: the words behind `megatron-sov`, as JSON; processes that a command starts have it."""


def note_command(words: Sequence[str]) -> None:
    """Let this process and those that it starts know what was typed."""
    # a word may hold bytes that are no UTF-8, or a zero byte where no shell made it
    os.environ[COMMAND_VARIABLE] = json.dumps(list(words))


def typed_command() -> list[str] | None:
    """Return the words behind `megatron-sov` that began this work; None where no command line did."""
    noted = os.environ.get(COMMAND_VARIABLE)
    return None if noted is None else list(json.loads(noted))


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
