"""Low-priority background processes, ended together with the parent process."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_sov.work.clusters.client import environment_outside_jobs
from megatron_sov.work.processes.children import STOP_SIGNALS, die_with_parent

LOWEST_PRIORITY = 19
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def background_environment() -> dict[str, str]:
    """Return the environment without rank and Slurm variables, with OMP_NUM_THREADS=1 and no GPU."""
    variables = {k: v for k, v in environment_outside_jobs().items() if k not in RANK_VARIABLES}
    return variables | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def enter_background(parent: int) -> None:
    """Take the lowest CPU and IO priority, end with `parent`, and ignore the signals that stop training."""
    die_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(LOWEST_PRIORITY)
    if sys.platform == "linux":
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


class BackgroundProcess:
    """A low-priority command with its output in a log file."""

    def __init__(self, command: list[str], log: Path) -> None:
        """Start the command, with its text as the first log line. Raises `OSError`: it cannot be started."""
        self._log = log
        self.began_s = time.monotonic()
        """Start time by the monotonic clock."""
        with open(log, "wb") as out:
            out.write(f"{shlex.join(command)}\n".encode())
            out.flush()
            # start through this module: preexec_fn is unsafe in a multithreaded process
            self._process = subprocess.Popen([sys.executable, "-m", __name__, str(os.getpid()), *command],
                                             stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                             env=background_environment())

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def last_words(self) -> str:
        """Last line of output, as a reason why the command failed."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[1:]
        if not lines:
            return f"its process ended with {self._process.returncode}"
        return lines[-1].removeprefix("error: ")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    enter_background(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # priorities and signal settings survive exec
