"""What a fork of a server does before it runs code of others."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_command() -> None:
    """Let this process end when the server that forked it does, which ends with the command; Ctrl-C is left
    to the command, which ends its processes itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(limit_bytes: int) -> None:
    """Let this process ask for no more memory than that, where a limit of the machine's is not lower; 0: no
    limit."""
    hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit_bytes and (hard_bytes == resource.RLIM_INFINITY or hard_bytes > limit_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_bytes))
