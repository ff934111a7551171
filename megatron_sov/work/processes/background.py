"""Work beside training: as humble as the system allows, and only as long as the process that
asked for it lives."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_sov.work.clusters.client import environment_outside_jobs
from megatron_sov.work.processes.children import FORWARDED, die_with_parent

LOWEST_PRIORITY = 19
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def humble_environment() -> dict[str, str]:
    """Return this process's environment without its place among ranks and jobs, for one thread and no GPU."""
    kept = {k: v for k, v in environment_outside_jobs().items() if k not in OF_A_RANK}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def be_humble(parent: int) -> None:
    """Take the lowest priorities, end with `parent`, and leave signals that ask the run for a stop to it."""
    die_with_parent(parent)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(LOWEST_PRIORITY)
    if sys.platform == "linux":
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


class BackgroundProcess:
    """A command that runs beside this process, humbly, with its output in a log."""

    def __init__(self, command: list[str], log: Path) -> None:
        """Start it; the log's first line is the command.

        Raises:
            OSError: it cannot be started.
        """
        self._log = log
        self.began_s = time.monotonic()
        """When it was started, by the monotonic clock."""
        with open(log, "wb") as out:
            out.write(f"{shlex.join(command)}\n".encode())
            out.flush()
            # through this module: a preexec_fn is not safe in a process that has threads
            self._process = subprocess.Popen([sys.executable, "-m", __name__, str(os.getpid()), *command],
                                             stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                             env=humble_environment())

    @property
    def took_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.began_s

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    @property
    def last_words(self) -> str:
        """What it said last: of a command that failed, why."""
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[1:]
        return (said[-1].removeprefix("error: ") if said
                else f"its process ended with {self._process.returncode}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    be_humble(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # all of it survives
