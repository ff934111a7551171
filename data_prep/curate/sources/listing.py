"""Which files a source has."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data_prep.curate.sources.source import PASSED_OVER, SourcePiece, SourceSettings
from megatron_sov.base.documents.files import is_hidden, passed_over, walk_files
from megatron_sov.base.errors import UserError, visible


def source_files(source: SourceSettings, wanted: Callable[[str], bool],
                 left_out: list[SourcePiece] | None = None,
                 tell: Callable[[str], object] = lambda sentence: None) -> list[str]:
    """Return the names of a source's files, sorted, each once.

    A file that the settings name is read whatever it is called.  Of a folder those that are `wanted` (by
    name) are, as `walk_files` finds them.

    Args:
        source: the source.
        wanted: tells by its name whether a file is.
        left_out: receives a piece for everything that the walk leaves out and that is not hidden, sorted; it
            holds nothing to read.
        tell: is given a sentence on what is hidden or not wanted in each folder.

    Raises:
        UserError: a folder cannot be listed, or there is no such file.
    """
    root = source.root
    names: set[str] = set()
    without: list[Path] = []
    for path in source.path:
        given = Path(os.path.abspath(source.folder / path))
        if given.is_dir():
            found: list[Path] = []
            walked = list(map(Path, walk_files(given, found)))
            names.update(_name(file, root) for file in walked if wanted(file.name))
            without += [one for one in found if not is_hidden(one.name)]
            if sentence := passed_over([_name(file, root) for file in walked if not wanted(file.name)],
                                       [_name(one, root) for one in found if is_hidden(one.name)]):
                tell(visible(f"{path}: {sentence}"))
        elif given.is_file():
            names.add(_name(given, root))
        else:
            raise UserError(f"source {source.name}: {given}: is no file and no folder; name one that "
                            "is there")
    if not names:
        refuse_nothing(source)
    if left_out is not None:
        left_out += [SourcePiece(PASSED_OVER, _name(path, root), 0, 0, 0) for path in sorted(set(without))
                     if path.is_dir() or wanted(path.name)]
    return sorted(names, key=lambda name: name.split("/"))


def refuse_nothing(source: SourceSettings) -> NoReturn:
    """Raise `UserError`: a source has no file to read."""
    raise UserError(f"source {source.name}: {', '.join(source.path)}: holds no file that format = "
                    f"{source.format!r} reads; name another folder or format")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def shown(name: str) -> str:
    r"""Return a file's name as text: bytes of it that are no UTF-8, and control characters, are written as
    escapes such as ``\xff``, and a ``\`` of its own as two, so that no two names look the same."""
    escaped = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return visible(escaped).replace("\n", r"\n").replace("\t", r"\t")
