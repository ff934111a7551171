"""Locks on files and folders that go with their process, however that ends; by the kernel,
so they are seen from other containers, and on some network file systems from other machines."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def holds(fd: int) -> bool | None:
    """Return whether no other process holds an open file or folder, which is then held until it is closed.

    None where that cannot be known: Lustre knows no locks unless mounted with `flock`, NFS none of folders.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_held(folder: Path) -> bool | None:
    """Return whether a process, wherever it runs, holds a folder; None where that cannot be known."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone, or no folder
        return False
    try:
        free = holds(fd)
        return None if free is None else not free
    finally:
        os.close(fd)
