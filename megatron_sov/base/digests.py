"""Hash files and bytes; a digest names the algorithm: "blake3:HEX" or "sha256:HEX".

Files of artifacts use BLAKE3, everything else (manifests, tokenizers, code, keys) uses SHA-256. On processors
without SHA-256 instructions, BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs) is ten to twenty times
faster at the same security, so hashing a file costs less than copying it.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

BLAKE3, SHA256 = "blake3", "sha256"
_BLOCK_BYTES = 1 << 20
"""Bytes read and hashed at a time: small enough to stay in the processor's cache."""


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


_ALGORITHMS: dict[str, Callable[[], _Hash]] = {BLAKE3: blake3, SHA256: hashlib.sha256}


class Digest:
    """An incremental hash."""

    def __init__(self, algorithm: str = BLAKE3) -> None:
        self._algorithm, self._hash = algorithm, _ALGORITHMS[algorithm]()

    def update(self, data: bytes | memoryview) -> None:
        """Hash the next bytes; releases the GIL."""
        self._hash.update(data)

    def text(self) -> str:
        """Return "ALGORITHM:HEX" for the bytes so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"


def hash_file(path: Path, algorithm: str = BLAKE3) -> str:
    """Return the digest of a file; it is read unbuffered, without a copy between file and hash."""
    digest, block = Digest(algorithm), memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(block):
            digest.update(block[:count])
    return digest.text()


def parse_digest_algorithm(digest: str) -> str:
    """Return the algorithm name in a digest. Raises `ValueError`: the algorithm is unknown."""
    algorithm = digest.partition(":")[0]
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"the digest {digest!r} must begin with one of {', '.join(_ALGORITHMS)}")
    return algorithm


def fingerprint_folder(folder: Path) -> list[list[Any]]:
    """Return relative path, size and mtime (ns) of every file below `folder`, without reading contents."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [[file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files]
