"""Digests of contents, which say how they were made: "blake3:HEX" or "sha256:HEX".

The rule: files of an artifact are hashed with BLAKE3; everything else (manifests, tokenizers, code, keys)
with SHA-256.  BLAKE3
(https://github.com/BLAKE3-team/BLAKE3-specs) is as hard to forge and, on processors without instructions
for SHA-256, ten to twenty times as fast, so that a hash costs less than the copy that it stands beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

BLAKE3, SHA256 = "blake3", "sha256"
_BLOCK_BYTES = 1 << 20
"""Bytes that are read and hashed at a time: few enough to stay in the processor's cache between the two."""


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


_ALGORITHMS: dict[str, Callable[[], _Hash]] = {BLAKE3: blake3, SHA256: hashlib.sha256}


class Digest:
    """The digest of bytes that come one after the other."""

    def __init__(self, algorithm: str = BLAKE3) -> None:
        self._algorithm, self._hash = algorithm, _ALGORITHMS[algorithm]()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes; leaves the interpreter free."""
        self._hash.update(data)

    def text(self) -> str:
        """Return the digest of all bytes so far, with the name of its algorithm."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"


def file_digest(path: Path, algorithm: str = BLAKE3) -> str:
    # one buffer for all blocks, unbuffered: no copy between the file and the hash
    digest, block = Digest(algorithm), memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(block):
            digest.update(block[:count])
    return digest.text()


def algorithm_of(digest: str) -> str:
    """Return the name of the algorithm that made a digest.

    Raises:
        ValueError: it is none that is known here.
    """
    algorithm = digest.partition(":")[0]
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"the digest {digest!r} is none of {', '.join(_ALGORITHMS)}")
    return algorithm


def fingerprint(folder: Path) -> list[list[Any]]:
    """Return name, size and time of every file below a folder: what changes where it does, without reading
    it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [[p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
