"""Number of ranks, rank index, start time, typed command and processor, available without torch."""

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_sov.base.errors import UserError

STARTTIME_FIELD = 22
"""1-based field in /proc/PID/stat: clock ticks between boot and process start."""
COMMAND_VARIABLE = "MEGATRON_SOV_COMMAND"
"""Environment variable with the arguments after `megatron-sov` in JSON, inherited by child processes."""
CPU_INFO = Path("/proc/cpuinfo")
MAX_LOCAL_RANKS = 4096
"""Maximum --nproc; larger values are typing errors."""


def process_started_s() -> float:
    """Return the Unix time of this process's start, exact to a clock tick (10 ms).

    On Linux subtract the process's age from the current time, which stays right after clock corrections.
    Elsewhere psutil reads the time that the system recorded.
    """
    # psutil adds ticks to the boot time, which Linux reports in whole seconds
    if sys.platform == "linux":
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as f:
            after_name = f.read().rpartition(")")[2].split()  # the name, field 2, may hold anything
        started_s = int(after_name[STARTTIME_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    import psutil  # not at the top: it is slow to import, and Linux does not need it

    return psutil.Process().create_time()


_command_start_s: float | None = None


def set_command_start(start_s: float | None) -> None:
    """Set the result of `get_command_start`: the Unix time at which the command started; None: no command."""
    global _command_start_s
    _command_start_s = start_s


def get_command_start() -> float:
    """Return the Unix time at which the command started, or the current time if no command runs."""
    return time.time() if _command_start_s is None else _command_start_s


def export_command(words: Sequence[str]) -> None:
    """Store the command's arguments in `COMMAND_VARIABLE` for `typed_command`, also in child processes."""
    # Arguments may contain bytes outside UTF-8, or a zero byte if no shell started the process.
    os.environ[COMMAND_VARIABLE] = json.dumps(list(words))


def typed_command() -> list[str] | None:
    """Return the arguments after `megatron-sov`, or None in a process without command line."""
    arguments_json = os.environ.get(COMMAND_VARIABLE)
    return None if arguments_json is None else list(json.loads(arguments_json))


def num_ranks(nproc: int | None) -> int:
    """Return the number of ranks: WORLD_SIZE under torchrun or Slurm, else `nproc` (default 1)."""
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}: must be at least 1")
    if nproc is not None and nproc > MAX_LOCAL_RANKS:
        raise UserError(f"--nproc {nproc}: must be at most {MAX_LOCAL_RANKS:,}")
    return int(os.environ["WORLD_SIZE"]) if has_launcher() else nproc or 1


def refuse_lone_world_size(nproc: int | None) -> None:
    """Refuse a command without --nproc where WORLD_SIZE is set without RANK: it would train in 1 process."""
    size = os.environ.get("WORLD_SIZE", "1")
    if nproc is None and size != "1" and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE={size}: is set without RANK; unset WORLD_SIZE, pass --nproc (processes "
                        "of this machine), or set RANK and MASTER_ADDR, too, as torchrun does")


def is_first_rank() -> bool:
    """Return whether this process is rank 0 or has no rank; needs no process group."""
    return os.environ.get("RANK", "0") == "0"


def local_gpu_index(num_gpus: int) -> int:
    """Return the rank's GPU index, LOCAL_RANK modulo the visible GPUs."""
    return int(os.environ.get("LOCAL_RANK", "0")) % num_gpus


def has_launcher() -> bool:
    """Return whether torchrun or Slurm started the process (RANK and WORLD_SIZE exist)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def read_processor_name() -> str:
    """Return the processor's model, or its architecture if Linux names no model."""
    lines = CPU_INFO.read_text(encoding="utf-8").split("\n") if CPU_INFO.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
