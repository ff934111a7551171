"""The folder beside an output in which a command keeps what it has, held by one process at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.artifacts import disk_errors
from megatron_sov.errors import UserError
from megatron_sov.file_locks import holds


@contextlib.contextmanager
def held(folder: Path, output: Path) -> Iterator[None]:
    """Make a folder, where it is missing, and hold it.

    Args:
        folder: where.
        output: what is to be made, for messages.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with disk_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
    fd = -1
    try:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # one that its holder has just finished with and removed is another folder than the next one's
        if fd < 0 or holds(fd) is False or not _is_at(fd, folder):
            raise UserError(f"--output {output}: is being written by another process ({folder} is held); "
                            "wait for it, or name another output")
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _is_at(fd: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(fd))
    except FileNotFoundError:
        return False
