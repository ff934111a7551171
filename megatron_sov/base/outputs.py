"""Where a result may come to lie, and what may be copied into it: asked before the work, not after."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from megatron_sov.base.errors import UserError

TRYING = ".try-"
"""Begin of the name of an empty folder that is there for a moment."""
RECORDS_OF_A_RUN = ("config.json", "events.jsonl")
"""Files whose folder is a run; nobody can make them again."""


def check_output(option: str, path: Path | None) -> None:
    """Check before the work that a file can be written at `path`, where one is asked for (not None); leaves
    everything as it was.

    Raises:
        UserError: the path is a folder, a device or a record of a run, or lies where nothing can be made.
    """
    if path is None:
        return
    if os.path.isdir(path):
        raise UserError(f"{option} {path}: is a folder; name the file to write, e.g. {path / 'result'}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{option} {path}: is no regular file, and would be replaced by one; "
                        "choose another path")
    _refuse_place(path, f"{option} {path}")
    real = Path(os.path.realpath(path))
    if real.name in RECORDS_OF_A_RUN and all(os.path.isfile(real.parent / name) for name in RECORDS_OF_A_RUN):
        raise UserError(f"{option} {path}: is a record of the run {real.parent}, which would be replaced; "
                        "choose another path")


def check_page(option: str, path: Path | None) -> None:
    """Check before the work that a page of HTML can be written at `path`, where one is asked for.

    Raises:
        UserError: as `check_output`, or the path's suffix is not that of HTML.
    """
    check_output(option, path)
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{option} {path}: is written as HTML; name it {path.with_suffix('.html')}, and "
                        "print it from a browser for other formats")


def refuse_input(option: str, path: Path, *inputs: Path) -> None:
    """Refuse to write a result over what it is made from.

    Raises:
        UserError: `path` is one of the inputs, by whatever name.
    """
    for given in inputs:
        if os.path.exists(path) and os.path.exists(given) and os.path.samefile(path, given):
            raise UserError(f"{option} {path}: is {given} itself, which is read; choose another path")


def refuse_nowhere(path: Path) -> None:
    """Raise `UserError` where no folder can be made at `path`: it has no name of its own
    (``.``, ``..``, ``/``), goes through a file, or through a folder that may not be written to."""
    if path.name in ("", ".."):
        raise UserError(f"{path}: has no name of its own; name what is to be made, e.g. {path / 'result'}")
    _refuse_place(path, str(path))


def behind_links(path: Path) -> Path:
    """Return the folder that a link stands for, where `path` is one: the artifact comes to lie there, on
    that disk, and the link stays.

    Raises:
        UserError: the link leads nowhere.
    """
    if not os.path.islink(path):
        return path
    target = path.resolve()
    if not target.exists():
        raise UserError(f"{path}: is a link to {target}, which does not exist; make that folder, or remove "
                        "the link")
    return target


def refuse_link_outside(folder: Path, file: Path) -> None:
    """Refuse a file of a foreign folder that is a link to somewhere else: it would be copied, and handed on.

    A link inside the folder is fine, and one from a snapshot of Hugging Face's cache to its blobs.

    Raises:
        UserError: naming where it leads.
    """
    root, there = folder.resolve(), file.resolve()
    # the hub's cache is made of links: snapshots/HASH/FILE leads to blobs/HASH
    cache = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(there.is_relative_to(allowed) for allowed in (root, *cache)):
        raise UserError(f"{file}: is a link to {there}, outside of its folder, and would be copied "
                        "and handed on; put the file itself there, or leave it out")


def refuse_unwritable(folder: Path, said: str) -> None:
    """Raise `UserError`, which begins with `said`, where nothing can be made in a folder.

    It is tried: permissions tell root nothing, and nobody anything of /proc or a disk that is
    mounted read-only.  What is made has no name, where the file system can do that: a kill leaves nothing.
    """
    try:
        try:
            # a file without a name: it is gone when it is closed, also after a kill
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            os.rmdir(tempfile.mkdtemp(prefix=TRYING, dir=folder))
    except OSError as e:
        raise UserError(f"{said}: nothing can be made in {folder} ({os.strerror(e.errno or 0)}); choose a "
                        "folder that you may write to") from None


def _refuse_place(path: Path, said: str) -> None:
    """Raise `UserError`, which begins with `said`, where nothing of that name can be made."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # libraries take names as UTF-8 only
        raise UserError(f"{said!a}: is no UTF-8; choose a name that is") from None
    try:
        os.lstat(path)
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{said}: cannot be a path ({os.strerror(e.errno)}); "
                            "choose another one") from None
    # the first folder above that is there; all below it would be made in it
    nearest = next(p for p in path.absolute().parents if os.path.exists(p))
    if not nearest.is_dir():
        raise UserError(f"{said}: {nearest} is a file, so nothing can lie in it; choose another path")
    refuse_unwritable(nearest, said)
