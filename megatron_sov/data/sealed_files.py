"""Files of numbers that are no artifacts of their own, with a hash of their content behind it: what one
process has computed, another one reads later, perhaps off a disk that is failing."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_sov.artifacts import atomic_write
from megatron_sov.digests import Digest

SEAL_BYTES = 32
"""Of the hash."""


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file as `atomic_write`, with the hash of its content behind it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    atomic_write(path, data + _seal_of(data))


def seal_damage(path: Path, size_bytes: int) -> str | None:
    """Return one sentence where a file that `write_sealed` wrote is missing or is not what was written, else
    None.

    Args:
        path: the file.
        size_bytes: of its content.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        return f"{path}: cannot be read ({os.strerror(e.errno or 0)})"
    if len(data) != size_bytes + SEAL_BYTES:
        return f"{path}: has {len(data)} bytes, must have {size_bytes} and {SEAL_BYTES} of a hash"
    return None if _seal_of(data[:size_bytes]) == data[size_bytes:] else (
        f"{path}: its content differs from the hash at its end")


def _seal_of(data: bytes) -> bytes:
    digest = Digest()
    digest.update(data)
    return bytes.fromhex(digest.text().partition(":")[2])
