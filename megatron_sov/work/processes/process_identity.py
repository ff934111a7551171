"""Which process wrote a record, and whether it has ended since, as far as can be known from here."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

CLOCK_TOLERANCE_S = 5.0
"""Start times of one process, as read by two others, may differ by the corrections of
the clock in between."""


def identity() -> dict[str, Any]:
    """Return what tells this process from all others: host, process_table (where its number means something),
    pid, and started_s."""
    return {"host": socket.gethostname(), "process_table": process_table(), **_process_here(os.getpid())}


def has_ended(record: Mapping[str, Any]) -> bool | None:
    """Return whether a process has ended; None: nothing can be known from here, on another machine or in
    another container of the same one.

    Args:
        record: its `identity`, or something else that somebody wrote.
    """
    import psutil

    pid, started_s = record.get("pid"), record.get("started_s")
    here = (socket.gethostname(), process_table())
    if (record.get("host"), record.get("process_table")) != here or not isinstance(pid, int) \
            or not isinstance(started_s, float):
        return None
    try:
        holder = psutil.Process(pid)
        if holder.status() == psutil.STATUS_ZOMBIE:  # it has ended, and its parent may never take note of it
            return True
        return bool(abs(holder.create_time() - started_s) >= CLOCK_TOLERANCE_S)
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


@cache
def _process_here(pid: int) -> dict[str, Any]:
    """Return number and start of this process; a fork has others."""
    import psutil

    return {"pid": pid, "started_s": psutil.Process(pid).create_time()}
