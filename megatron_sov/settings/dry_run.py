"""`--dry-run` of a command that writes: what it would read and write, from its options alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_FILES = 10_000
"""Of a folder that are counted; on a shared disk each costs a question."""
NOTHING_DONE = "dry run: options and paths were checked, not --set nor files; nothing was written or run"


def describe(read: Sequence[Path], written: Sequence[Path], said: Sequence[tuple[str, Any]], *,
             overwrite: bool) -> str:
    """Return what a command would do.

    Args:
        read: files and folders that exist.
        written: what it makes.
        said: options that differ from their defaults, with their values.
        overwrite: whether what is there may be replaced.
    """
    rows = [("reads", f"{path}: {_size(path)}") for path in read]
    rows += [("writes", f"{path}: {_fate(path, overwrite)}") for path in written]
    rows += [("with", f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
             for name, value in said]
    lines = [f"  {'' if i and rows[i - 1][0] == word else word:<8} {text}"
             for i, (word, text) in enumerate(rows)]
    return "\n".join([*lines, NOTHING_DONE])


def _size(path: Path) -> str:
    if not path.is_dir():
        return f"{path.stat().st_size:,} bytes"
    files = [file for file in itertools.islice(path.rglob("*"), MAX_FILES) if file.is_file()]
    more = " or more" if len(files) == MAX_FILES else ""
    return f"a folder of {len(files):,} files{more}, {sum(f.stat().st_size for f in files):,} bytes{more}"


def _fate(path: Path, overwrite: bool) -> str:
    if not (path.exists() or path.is_symlink()):
        return "new"
    return "is there, and would be replaced" if overwrite else \
        "is there: the command goes on with it where it can, else refuses it"
