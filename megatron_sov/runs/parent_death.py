"""Processes that live as long as the one that started them, and the signals that ask for a
stop.  No torch here."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megatron_sov.errors import ExitCode

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask for a stop; the launcher passes them on to its ranks.  SIGUSR1 is what Slurm is asked to
send before the time limit."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed run leaves none behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(ExitCode.CRASH)
