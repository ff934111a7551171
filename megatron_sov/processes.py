"""Who a process is, so that others can tell from its record whether it has ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

CLOCK_TOLERANCE_S = 5.0
"""Start times of one process, as read by two others, may differ by the corrections of
the clock in between."""


def this_process() -> dict[str, Any]:
    """Return host, pid, started_s, process_table (where the pid means something), and in a Slurm job
    slurm_job and slurm_restart, how often it was started anew."""
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "started_s": me.create_time(),
            "process_table": process_table(), **_slurm_job()}


def has_ended(record: Mapping[str, Any]) -> bool | None:
    """Return whether the process that a record tells of has ended; None where that cannot be known here.

    Slurm starts a job anew when it has given up the nodes of the start before, so that one's processes need
    not be waited for.

    Args:
        record: as `this_process` gave it; what it lacks is not known.
    """
    now = _slurm_job()
    if (now and record.get("slurm_job") == now["slurm_job"]
            and record.get("slurm_restart", 0) < now["slurm_restart"]):
        return True
    if (record.get("host"), record.get("process_table")) != (socket.gethostname(), process_table()):
        return None  # its process number means nothing here
    try:
        holder = psutil.Process(record["pid"])
        if holder.status() == psutil.STATUS_ZOMBIE:  # its parent may never take note of it
            return True
        return bool(abs(holder.create_time() - record["started_s"]) >= CLOCK_TOLERANCE_S)
    except psutil.NoSuchProcess:
        return True


@cache
def process_table() -> str:
    """Return what tells one table of processes from others: the boot of the kernel, and the namespace of
    process numbers in it, which a container has of its own.  Empty where the kernel does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _slurm_job() -> dict[str, Any]:
    """Return the Slurm job that this process belongs to, and how often it was started anew; nothing outside
    of Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"slurm_job": job, "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)} if job else {}
