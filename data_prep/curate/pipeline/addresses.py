"""Hash inputs and settings into folder names, so that a changed setting or file gets a new folder."""

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
"""Raised when equal inputs and settings would give different files."""
FileMark = list[int]
"""Size in bytes and modification time in ns. Raw files may be terabytes, so their content is not hashed."""


def compute_address(ingredients: Mapping[str, Any]) -> str:
    """Hash plain values to an address of 12 hexadecimal digits."""
    text = json.dumps({"format": FORMAT_VERSION, **ingredients}, sort_keys=True, ensure_ascii=False)
    # File names may hold bytes that are not UTF-8.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def read_file_mark(file: Path) -> FileMark:
    """Return size and modification time; raise `UserError` for an unreadable file."""
    try:
        stat = os.stat(file)
    except OSError as e:
        raise _build_read_error(file, e) from None
    return [stat.st_size, stat.st_mtime_ns]


def check_unchanged(file: Path, mark: FileMark) -> None:
    """Raise `UserError` if a file changed after `read_file_mark` returned `mark`."""
    if read_file_mark(file) != mark:
        raise UserError(f"{file}: changed while the run was reading it; run the command again when nothing "
                        "writes to it")


def hash_tree(path: Path) -> str:
    """Hash a file, or names and contents of a folder's files. Raises `UserError`: a file cannot be read."""
    if path.is_file():
        return compute_address({"files": [["", _hash_content(path)]]})
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return compute_address({"files": [[file.relative_to(path).as_posix(), _hash_content(file)]
                                      for file in files]})


def _hash_content(file: Path) -> str:
    try:
        return hash_file(file, BLAKE3).partition(":")[2][:32]
    except OSError as e:
        raise _build_read_error(file, e) from None


def _build_read_error(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read ({error.strerror or error}); check the path and its "
                     "permissions")


def list_input_names(pieces: Sequence[SourcePiece]) -> list[str]:
    """List the files to read for pieces, companion files included, each once."""
    return list(dict.fromkeys(name for piece in pieces if piece.format != NO_FORMAT
                              for name in (piece.file, *piece.companion_files)))
