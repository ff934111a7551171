"""Addresses: the hash of all that a folder's content follows from, so that a changed setting or input has a
folder of its own and what depends on it too, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.curate.sources.source import NO_FORMAT, SourcePiece
from megatron_sov.base.digests import BLAKE3, hash_file
from megatron_sov.base.errors import UserError

FORMAT_VERSION = 6
"""Raised when the same inputs and settings would have other files."""
FileMark = list[int]
"""Size and time of change of a file: raw files, which may be terabytes, are known by it and not by their
content."""


def compute_address(ingredients: Mapping[str, Any]) -> str:
    """Return the address of what follows from plain values, in 12 hexadecimal digits."""
    written = json.dumps({"format": FORMAT_VERSION, **ingredients}, sort_keys=True, ensure_ascii=False)
    # names of files may hold bytes that are no text
    return hashlib.sha256(written.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def read_file_mark(file: Path) -> FileMark:
    """Return the size and the time of change of a file.

    Raises:
        UserError: it cannot be looked at.
    """
    try:
        stat = os.stat(file)
    except OSError as e:
        raise _unreadable(file, e) from None
    return [stat.st_size, stat.st_mtime_ns]


def check_unchanged(file: Path, mark: FileMark) -> None:
    """Raise `UserError` where a file has changed since its mark was taken."""
    if read_file_mark(file) != mark:
        raise UserError(f"{file}: has changed since the run looked at it; run the command again when nobody "
                        "writes to it")


def hash_tree(path: Path) -> str:
    """Return the hash of a file's content, or of the names and contents in a folder.

    Raises:
        UserError: something cannot be read.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return compute_address({"files": [["" if file == path else file.relative_to(path).as_posix(),
                                       _content_hash(file)]
                              for file in files]})


def _content_hash(file: Path) -> str:
    try:
        return hash_file(file, BLAKE3).partition(":")[2][:32]
    except OSError as e:
        raise _unreadable(file, e) from None


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read ({error.strerror or error}); check the path and its "
                     "permissions")


def list_input_names(pieces: Sequence[SourcePiece]) -> list[str]:
    return list(dict.fromkeys(name for piece in pieces if piece.format != NO_FORMAT
                              for name in (piece.file, *piece.companion_files)))
