"""Check output paths before the work starts, and links before files are copied."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, choose_free_path

PROBE_PREFIX = ".try-"
"""Name prefix for an empty folder created briefly to test write access."""
MAX_NAME_CHARS = 40
"""Maximum length of a proposed name."""
RUN_RECORDS = ("config.json", "events.jsonl")
"""Files in a training run's folder that a run cannot recreate."""


def check_output(option: str, path: Path | None) -> None:
    """Check that a command can write a file at `path` (None: no output requested); changes nothing on disk.
    Raises `UserError`: `path` is a folder, a device or a record of a run, or its folder is not writable."""
    if path is None:
        return
    if os.path.isdir(path):
        raise UserError(f"{option} {path}: is a folder; name the file to write, e.g. {path / 'result'}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{option} {path}: is not a regular file, and would be replaced by one; "
                        "choose another path")
    _refuse_place(path, f"{option} {path}")
    real = Path(os.path.realpath(path))
    if real.name in RUN_RECORDS and all(os.path.isfile(real.parent / name) for name in RUN_RECORDS):
        raise UserError(f"{option} {path}: is a record of the run {real.parent}, which would be replaced; "
                        "choose another path")


def check_place(option: str, path: Path, *, is_file: bool) -> None:
    """Check that a command can write the file, or the folder, of an option. Raises `UserError`: as
    `check_output` and `check_creatable`, or a file lies in the folder's place; proposes a new path here."""
    try:
        if is_file:
            check_output(option, path)
        elif os.path.isfile(path):
            raise UserError(f"{path}: is a file; {option} needs a folder")
        elif not os.path.isdir(path):
            check_creatable(path)
    except UserError as e:
        fix = Fix(words={str(path): choose_free_path(path.name[:MAX_NAME_CHARS])})
        raise UserError(e.sentence, fix if path.stem and os.access(".", os.W_OK) else None) from None


def check_page(option: str, path: Path | None) -> None:
    """Check that a command can write an HTML page at `path` (None: no page requested). Raises `UserError`: as
    `check_output`, or the suffix is not .html or .htm."""
    check_output(option, path)
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        page = path.with_suffix(".html")
        raise UserError(f"{option} {path}: is written as HTML; name it {page}, and print it from a browser "
                        "for other formats", Fix(words={str(path): str(page)}))


def refuse_input_as_output(option: str, path: Path, *inputs: Path) -> None:
    """Raise `UserError` if `path` and an input are the same file, also through links."""
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{option} {path}: is {source} itself, which is read; choose another path")


def check_creatable(path: Path) -> None:
    """Raise `UserError` if no folder can be created at `path`.

    Reasons: ``.``, ``..`` and ``/`` have no name of their own, a parent is a file, or a parent is not
        writable.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: has no name of its own; name the new folder, e.g. {path / 'result'}")
    _refuse_place(path, str(path))


def resolve_link(path: Path) -> Path:
    """Return the target folder if `path` is a link, else `path`; an artifact replaces the target, not the
    link. Raises `UserError`: the target does not exist."""
    if not os.path.islink(path):
        return path
    target = path.resolve()
    if not target.exists():
        raise UserError(f"{path}: is a link to {target}, which does not exist; make that folder, or remove "
                        "the link")
    return target


def refuse_outside_link(folder: Path, file: Path) -> None:
    """Refuse a link that leads out of a foreign folder: a copy would expose another file on this machine.

    Links inside the folder, and from a snapshot in Hugging Face's cache to its blobs, are allowed. Raises
    `UserError`: names the link's target.
    """
    root, target = folder.resolve(), file.resolve()
    # the hub's cache is made of links: snapshots/HASH/FILE leads to blobs/HASH
    cache = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(target.is_relative_to(allowed) for allowed in (root, *cache)):
        raise UserError(f"{file}: is a link to {target}, outside of its folder, and would be copied "
                        "and handed on; put the file itself there, or leave it out")


def refuse_unwritable(folder: Path, subject: str) -> None:
    """Raise `UserError` (starting with `subject`) if `folder` does not allow new files.

    Creating a file is the only reliable test: root passes every permission check, and nobody can write to
    /proc or to a read-only file system. A file without a name (`O_TMPFILE`) leaves nothing after a kill.
    """
    try:
        try:
            # the kernel deletes a nameless file when it is closed, also after a kill
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            os.rmdir(tempfile.mkdtemp(prefix=PROBE_PREFIX, dir=folder))
    except OSError as e:
        raise UserError(f"{subject}: nothing can be made in {folder} ({os.strerror(e.errno or 0)}); choose a "
                        "folder that you may write to") from None


def _refuse_place(path: Path, subject: str) -> None:
    """Raise `UserError` (starting with `subject`) if no file can be created at `path`."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # libraries accept only UTF-8 names
        raise UserError(f"{subject!a}: is not valid UTF-8; choose another name") from None
    try:
        os.lstat(path)
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{subject}: cannot be a path ({os.strerror(e.errno)}); "
                            "choose another one") from None
    # the nearest existing parent, where the missing folders would be created
    nearest = next(p for p in path.absolute().parents if os.path.exists(p))
    if not nearest.is_dir():
        raise UserError(f"{subject}: {nearest} is a file, so nothing can lie in it; choose another path")
    refuse_unwritable(nearest, subject)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`, or copy the file if the file system refuses links. Raises `UserError`:
    `source` is missing."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(f"{source}: is missing; make it again or restore it from a copy") from None
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)
