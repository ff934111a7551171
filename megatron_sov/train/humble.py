"""Work beside training: as humble as the system allows, and only as long as the process that asked for it lives."""

from __future__ import annotations

import os
import signal
import sys

import psutil

from megatron_sov.mcore.lifetimes import FORWARDED, die_with_parent

LOWEST_PRIORITY = 19
OF_A_JOB = ("SLURM_", "SBATCH_")
WHERE_SLURM_IS = "SLURM_CONF"
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def humble_environment() -> dict[str, str]:
    """Return this process's environment without its place among ranks and jobs, for one thread and no GPU."""
    kept = {k: v for k, v in os.environ.items()
            if k == WHERE_SLURM_IS or (k not in OF_A_RANK and not k.startswith(OF_A_JOB))}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def be_humble(parent: int) -> None:
    """Take the lowest priorities, end with `parent`, and leave signals that ask the run for a stop to it."""
    die_with_parent(parent)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(LOWEST_PRIORITY)
    if sys.platform == "linux":
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def command_line(command: list[str]) -> list[str]:
    """Return the command that runs `command` humbly, for as long as this process lives."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


if __name__ == "__main__":
    be_humble(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # all of it survives
