"""Which files a source has."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from data_prep.sources.source import SourceSettings
from megatron_sov.documents.synthesis import KEPT, is_synthesis
from megatron_sov.documents.visible import visible
from megatron_sov.errors import UserError

VERSION_CONTROL = frozenset(["CVS", "__MACOSX"])
"""Folders that hold no files of the user's, beside those with a leading dot."""


def source_files(source: SourceSettings, wanted: Callable[[str], bool]) -> list[str]:
    """Return the names of a source's files, sorted, each once.

    A file that the settings name is read whatever it is called.  Of a folder those that are `wanted` (by
    name) are, without hidden ones, and of a folder of `sov-data synth` the samples that were kept; links to
    folders are not followed, nor links to files outside of the
    source's `root`, so that no circle is walked and nothing else is read.

    Raises:
        UserError: a folder cannot be listed, or there is no such file.
    """
    root = source.root
    names: set[str] = set()
    for path in source.path:
        given = Path(os.path.abspath(source.folder / path))
        if given.is_dir():
            names.update(name for name in _below(given, root) if wanted(os.path.basename(name)))
        elif given.is_file():
            names.add(_name(given, root))
        else:
            raise UserError(f"source {source.name}: {given}: is no file and no folder; name one that "
                            "is there")
    if not names:
        refuse_nothing(source)
    return sorted(names, key=lambda name: name.split("/"))


def refuse_nothing(source: SourceSettings) -> NoReturn:
    """Raise `UserError`: a source has no file to read."""
    raise UserError(f"source {source.name}: {', '.join(source.path)}: holds no file that format = "
                    f"{source.format!r} reads; name another folder or format")


def _below(folder: Path, root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

    real_root = os.path.realpath(root)
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in VERSION_CONTROL)
        if is_synthesis(files):
            folders[:], files = [], [KEPT]
        for file in files:
            path = os.path.join(where, file)
            if not file.startswith(".") and _is_inside(path, real_root):
                yield _name(Path(path), root)


def _is_inside(path: str, real_root: str) -> bool:
    """Return whether a path is an ordinary file, or a link to one below the root."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            target = os.path.realpath(path, strict=True)
            return target.startswith(f"{real_root.rstrip('/')}/") and stat.S_ISREG(os.stat(target).st_mode)
    except OSError:
        return False
    return stat.S_ISREG(mode)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def shown(name: str) -> str:
    r"""Return a file's name as text: bytes of it that are no UTF-8, and control characters, are written as
    escapes such as ``\xff``, and a ``\`` of its own as two, so that no two names look the same."""
    escaped = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return visible(escaped).replace("\n", r"\n").replace("\t", r"\t")
