"""When the work on a run began, long before its first event: the start of the process, with all that it imports."""

from __future__ import annotations

import time

import psutil

_began: list[float] = []


def note_beginning() -> None:
    """Note that the work on a run begins; a command's first run began with its process, a later one begins now.

    Ranks that are forked from this process afterwards know it too.
    """
    _began.append(time.time() if _began else psutil.Process().create_time())


def began_s() -> float:
    """Return the Unix time at which the work on the current run began in this process, or in the one that forked it."""
    return _began[-1] if _began else psutil.Process().create_time()
