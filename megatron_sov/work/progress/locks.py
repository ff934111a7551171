"""Who works in a folder: one process at a time, and nobody once that one has ended, however it did.

The kernel keeps these locks, so they are seen from other containers, and on most network file systems from
other machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.base.artifacts import disk_errors, holds
from megatron_sov.base.errors import UserError

LOCK = ".lock"
"""File that is held in place of its folder, where a file system locks files alone."""


@contextlib.contextmanager
def holding(folder: Path, said: str | Path) -> Iterator[None]:
    """Make a folder, where it is missing, and hold it.

    Args:
        folder: where.
        said: what is made in it, for messages: an option and its value, or a path.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with _trying(folder) as is_ours:
        if not is_ours:
            raise UserError(f"{said}: is being written by another process ({folder} is held); wait for it, "
                            "or name another output")
        yield


@contextlib.contextmanager
def taking(folder: Path) -> Iterator[bool]:
    """Hold a folder that is there only as long as somebody holds it; gives whether it is held by this block,
    and not by another one, of whatever process.

    Raises:
        UserError: it cannot be made.
    """
    with _trying(folder) as is_ours:
        try:
            yield is_ours
        finally:
            if is_ours:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _trying(folder: Path) -> Iterator[bool]:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        yield _hold(folder, stack)


def _hold(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Return whether no other process holds a folder, which is then held as long as `stack` is open."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        is_ours = holds(fd)
        if is_ours is None:  # NFS locks files that are open for writing, and nothing else
            lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            is_ours = holds(lock)
        # one that its holder has just finished with and removed is another folder than the next one's
        return is_ours is not False and os.path.samestat(os.stat(folder), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for a folder; where nothing can be locked, go on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
