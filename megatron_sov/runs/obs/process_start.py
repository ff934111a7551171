"""When this process started: the work on a run begins there, with imports, long before its first event."""

from __future__ import annotations

import os
import sys
import time

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
