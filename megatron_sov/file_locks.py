"""Locks on files and folders that go with their process, however that ends; by the kernel,
so they are seen from other containers, and on many network file systems from other machines."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def holds(fd: int) -> bool:
    """Return whether no other process holds an open file or folder, which is then held until it is closed.

    Where a file system knows no locks (Lustre unless mounted with `flock`), everything is free.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_held(folder: Path) -> bool:
    """Return whether a process, wherever it runs, holds a folder."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone, or no folder
        return False
    try:
        return not holds(fd)
    finally:
        os.close(fd)
