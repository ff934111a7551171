"""Artifacts: folders with a hashed `manifest.json`, written atomically.

A tokenizer, a set of token shards, a checkpoint: each is a folder whose manifest holds a format version, the
hash of every file, the settings and the manifests that it was made from.  An artifact is built under a
temporary name, synced to disk, and renamed; a half-written artifact therefore does not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import SHA256, algorithm_of, file_digest
from megatron_sov.base.errors import UserError, download
from megatron_sov.base.outputs import behind_links, refuse_nowhere

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_TEMPORARY_NAME = re.compile(r"\.(.+)\.tmp-.+-\d+")
MADE_BY = {"corpus": "`sov-data run` or `sov-data demo-corpus`",
           "tokenizer": "`sov-tokenizer train` or `sov-tokenizer import`",
           "tokens": "`sov-data pack` or `sov-data mix`",
           "scorer": "`sov-data scorer train`",
           "difficulty_labels": "`sov-data difficulty label`",
           "probing_sets": "`sov-data probing-sets`",
           "teacher_states": "`megatron-sov distill states`",
           "codec": "`megatron-sov codec import`",
           "checkpoint": "a run (RUN/checkpoints/step-N) or `megatron-sov convert from-hf`"}
"""Kind of an artifact -> the commands that write one."""
MAX_ORIGINS = 200
_NO_HASH = "0" * 64
_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "larger than the limit on file sizes (ulimit -f)"}


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What the manifest holds about one file of an artifact."""

    digest: str
    """Name of the algorithm and hash of the content (`digests.py`)."""
    size_bytes: int

    @staticmethod
    def read(raw: dict[str, Any]) -> FileRecord:
        """Return what stands in a manifest.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is no record.
        """
        algorithm_of(raw["digest"])
        return FileRecord(raw["digest"], raw["size_bytes"])

    @staticmethod
    def of(file: Path) -> FileRecord:
        return FileRecord(file_digest(file), file.stat().st_size)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of an artifact's `manifest.json`."""

    kind: str
    """What the artifact is: "tokenizer", "tokens", "checkpoint", "hf_model"."""
    content: dict[str, Any]
    """Counts and facts that readers of this kind rely on."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """The artifacts that it was made from: kind, path and manifest hash of each."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """Relative path -> hash and size of every file except the manifest."""
    created_s: float = 0.0
    """Unix time at which it was completed."""
    format_version: int = FORMAT_VERSION
    """Version of this layout; a newer one than the code knows is refused."""
    sha256: str = ""
    """Hash of the manifest's own bytes with zeros in this place; empty in manifests that
    were written by hand.  Stays last."""


def sha256_file(path: Path) -> str:
    return file_digest(path, SHA256).removeprefix(f"{SHA256}:")


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk, so that a later rename cannot come before its bytes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with new_file(Path(path)) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: Path, *, makes_parents: bool = False) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to: the file gets its own when it is whole and on the
    disk, and takes the place of what is there.

    Args:
        path: where it comes to lie.
        makes_parents: whether folders above it are made.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    with disk_errors(path):
        if makes_parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # the bytes reach the disk before the name does: a power cut may leave the old file, never a torn
            # new one
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
            # a rename is durable only when its folder is on the disk too
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, first_stays: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`: it gets its own name when its files are on the disk.

    Args:
        path: where it comes to lie.
        first_stays: where there is one by then, it is an equal one, and stays; else it is replaced.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
            temporary.mkdir(parents=True)
            yield temporary
            # files and sub-folders first, so that the rename below cannot come before their bytes
            for file in temporary.rglob("*"):
                fsync_path(file)
            if first_stays:
                rename_unless_taken(temporary, path)
            else:
                publish(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def rename_unless_taken(built: Path, path: Path) -> bool:
    """Give a folder its final name; returns False where there is one of that name, which stays."""
    try:
        # rename(2) refuses a folder that is not empty: of two writers exactly one gets the name
        os.rename(built, path)
    except OSError:
        if not path.is_dir():
            raise
        return False
    fsync_path(path.parent)
    return True


def delete_folder(path: Path, hidden: Path) -> None:
    """Delete a folder that has become `hidden` before: a kill on the way leaves no torn one under its name.

    Raises:
        FileNotFoundError: another process was faster.
    """
    # one step takes the name away; what follows may be interrupted anywhere
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def final_name(name: str) -> str:
    """Return what `new_file` or `new_folder` will call a temporary name; of another its own."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found[1] if found else name


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")


def write_output(path: Path, data: str | bytes) -> None:
    """Write the result of a command, and the folders above it where they are missing.

    Raises:
        UserError: the disk is full or a folder cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)


def holds(fd: int) -> bool | None:
    """Return whether no other process holds an open file or folder, which is then held until it is closed.

    None where that cannot be known: Lustre knows no locks unless mounted with `flock`, NFS none of folders.
    """
    try:
        # a lock of the open file: the kernel drops it when the process ends, however that ends
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_held(folder: Path) -> bool | None:
    """Return whether a process, wherever it runs, holds a folder; None where that cannot be known."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone, or no folder
        return False
    try:
        free = holds(fd)
        return None if free is None else not free
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a read-only file system into a `UserError`
    that names `path`."""
    try:
        yield
    except OSError as e:
        if e.errno in _NO_ROOM:
            raise UserError(f"{path}: {_NO_ROOM[e.errno]}; free some space and run the "
                            "same command again") from e
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG):
            raise UserError(f"{path}: cannot be written ({os.strerror(e.errno)}); "
                            "choose a folder that you may write to") from e
        raise


def to_json(value: Any) -> str:
    """Serialise dataclasses and plain values as indented JSON; floats read back to the same bits."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


class ArtifactWriter:
    """An artifact under construction; obtained from `new_artifact`."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        """The temporary folder to write files into."""
        self.kind = kind
        self.content: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.inputs: list[dict[str, str]] = []
        self.known_files: dict[str, FileRecord] = {}
        """Files whose hash the writer already knows; the rest are hashed on completion."""
        self.leave_out: frozenset[str] = frozenset()
        """Names directly inside the folder that are no part of the artifact."""

    def add_input(self, path: Path, *, leaves: bool = False) -> None:
        """Record another artifact as an input of this one; of what `leaves` this machine by hash and last
        name."""
        name = path.resolve().name if leaves else str(path)
        self.inputs.append({"kind": read_manifest(path).kind, "path": name,
                            "manifest_sha256": manifest_sha256(path)})

    def complete(self) -> None:
        """Hash and sync every file, then write the manifest (still under the temporary name)."""
        files = dict(self.known_files)
        # sorted, so that manifests list files in one order on every file system
        inside = [p for p in sorted(self.path.iterdir()) if p.name not in self.leave_out]
        found = [p for top in inside for p in ([top, *top.rglob("*")] if top.is_dir() else [top])]
        for file in sorted(p for p in found if p.is_file()):
            name = file.relative_to(self.path).as_posix()
            if name not in files:
                files[name] = FileRecord.of(file)
            fsync_path(file)
        for folder in (p for p in found if p.is_dir()):
            fsync_path(folder)
        # the manifest holds its own hash, which is taken with zeros in that place; `sha256` is the last
        # field, so that the last run of zeros in the text is that place
        manifest = Manifest(self.kind, self.content, self.settings, self.inputs, files, time.time(),
                            sha256=_NO_HASH)
        head, _, tail = to_json(manifest).rpartition(_NO_HASH)
        atomic_write(self.path / MANIFEST, head + _hash_around(head.encode(), tail.encode()) + tail)


def _hash_around(head: bytes, tail: bytes) -> str:
    return hashlib.sha256(head + _NO_HASH.encode() + tail).hexdigest()


@contextlib.contextmanager
def new_artifact(path: str | Path, kind: str, *, overwrite: bool = False) -> Iterator[ArtifactWriter]:
    """Build an artifact in a temporary folder beside `path`; it appears under `path` only when complete.

    Args:
        path: the folder that will hold the artifact.
        kind: the manifest's kind.
        overwrite: replace an artifact of the same kind that is already there.

    Raises:
        UserError: `path` exists and may not be replaced, or the disk refuses.
    """
    # the temporary folder has to be on the disk of the final one: a rename does not cross disks
    path = behind_links(Path(path))
    refuse_nowhere(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        refuse_existing(path, kind, overwrite)
        # leftovers are cleared before, while this folder is not there yet: it would look like one
        with _hold_new_folder(temporary, path):
            try:
                writer = ArtifactWriter(temporary, kind)
                yield writer
                writer.complete()
                publish(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _hold_new_folder(temporary: Path, path: Path) -> Iterator[None]:
    """Make a temporary folder and hold it, so that nobody takes it for a leftover: in another container, or
    on another machine that sees the same disk, the number in its name means nothing."""
    try:
        temporary.mkdir()
    except FileExistsError:  # a container's processes may all have the same number
        raise UserError(f"{path}: another process is making it; wait for it, choose another output folder, "
                        f"or delete {temporary} if it is what a killed one left") from None
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        holds(fd)
        yield
    finally:
        os.close(fd)


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete folder to its final name, moving an older artifact out of the way first."""
    old = None
    if path.exists():
        # between the two renames nothing has the name; after a kill there `clear_leftovers` puts the old one
        # back
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
    os.rename(temporary, path)
    fsync_path(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def refuse_existing(path: Path, kind: str, overwrite: bool) -> None:
    """Raise `UserError` where no folder can come to lie at `path`, or where it is taken.

    It is taken by anything without `overwrite`, by a foreign folder even with it.
    """
    is_link, path = os.path.islink(path), behind_links(path)
    refuse_nowhere(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        if path.is_dir() and not is_link:
            path.rmdir()
        return
    is_ours = (path / MANIFEST).is_file() and read_manifest(path).kind == kind
    if not overwrite:
        raise UserError(f"{path}: already exists; choose another output folder"
                        + ", or pass --overwrite to replace it" * is_ours)
    if not is_ours:
        raise UserError(f"{path}: exists and is not a '{kind}' artifact, so it is not replaced; "
                        "choose another output folder")


def clear_leftovers(path: Path) -> None:
    """Clear what killed processes left beside `path`: delete temporary folders,
    put back an artifact moved out of the way."""
    name = glob.escape(path.name)
    for leftover in sorted([*path.parent.glob(f".{name}.tmp-*"), *path.parent.glob(f".{name}.old-*")]):
        stem, _, pid = leftover.name.rpartition("-")
        if not pid.isdigit() or not _is_left(leftover, int(pid)):
            continue
        # a kill of `publish` between its two renames: the old artifact is the only one there is
        if stem.endswith(".old") and not path.exists():
            os.rename(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_left(folder: Path, pid: int) -> bool:
    """Return whether nobody works in a folder any more, in whose name a process put its number."""
    # the lock says more than the number, which may be of another container or machine
    held = is_held(folder)
    if pid == os.getpid():  # of an earlier start of this container, or of another one that is at work
        return held is False
    return not held and _has_ended(pid)


def _has_ended(pid: int) -> bool:
    """Return whether a process has ended, be it that its parent has not yet taken note of it."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return not psutil.pid_exists(pid)


def read_manifest(path: str | Path, kind: str | None = None) -> Manifest:
    """Read an artifact's manifest.

    Raises:
        UserError: there is no readable manifest, its format is newer than this code,
            or its kind is not `kind`.
    """
    file = Path(path) / MANIFEST
    try:
        written = file.read_bytes()
        raw = json.loads(written.decode())
        # before the fields are read: a newer format may have others, and deserves another message than damage
        if raw["format_version"] > FORMAT_VERSION:
            raise UserError(f"{file}: format_version {raw['format_version']} is newer than {FORMAT_VERSION}, "
                            "the newest that this version reads; update megatron-sov")
        files = {name: FileRecord.read(record) for name, record in raw.pop("files").items()}
        # names come from a file that a stranger may have made, and are joined to paths later
        if outside := [name for name in files if not _is_inside(name)]:
            raise ValueError(f"it names the file {outside[0]!r}, which is not inside the folder")
        manifest = Manifest(files=files, **raw)
        # bytes as they were written, not JSON that was read and written again: that could differ in form
        head, _, tail = written.rpartition(manifest.sha256.encode() or b"none")
        if manifest.sha256 and _hash_around(head, tail) != manifest.sha256:
            raise ValueError("its content differs from its own hash")
    except (FileNotFoundError, NotADirectoryError):
        wanted = f"a '{kind}' artifact" if kind else "an artifact"
        if not Path(path).exists():
            raise UserError(f"{path}: does not exist, so it is not {wanted}; check the path"
                            f"{download(path)}") from None
        raise UserError(f"{path}: has no {MANIFEST}, so it is not {wanted}; "
                        f"pass the folder that {MADE_BY.get(kind or '', 'the earlier step')} wrote") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as e:
        raise UserError(f"{file}: is damaged ({e}); make the artifact again or restore "
                        "it from a copy") from None
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{path}: is a '{manifest.kind}' artifact where a '{kind}' artifact is needed; "
                        f"pass what {MADE_BY.get(kind, 'the earlier step')} wrote")
    return manifest


def _is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def inputs_of(path: Path, manifest: Manifest) -> list[dict[str, str]]:
    """Return kind, path and manifest_sha256 of each artifact that one was made from.

    Raises:
        UserError: its manifest names an input without one of them.
    """
    inputs: list[Any] = list(manifest.inputs)
    for item in inputs:
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str)
                                                 for key in ("kind", "path", "manifest_sha256")):
            raise UserError(f"{path / MANIFEST}: is damaged (an input without kind, path or hash); make "
                            "the artifact again or restore it from a copy")
    return inputs


def places_of(path: str, by: Path) -> list[Path]:
    """Return where an input may lie now: where its path says, from here or from the artifact or run `by`, or
    next to that under its own name, or in a run beside it (RUN/checkpoints/step-N), where both were moved."""
    return [Path(path), by.parent / path, by.parent / Path(path).name,
            by.parent / Path(*Path(path).parts[-3:])]


def find_input(path: str, sha256: str, by: Path, elsewhere: Mapping[str, Path] | None = None) -> Path | None:
    """Return where an input lies now, if it is what it was.

    Args:
        path: where it lay.
        sha256: of its manifest.
        by: the artifact or run that was made from it.
        elsewhere: hash of a manifest -> folder, of what lies at none of `places_of`.
    """
    return next((place for place in places_of(path, by) if _hash_at(place) == sha256),
                (elsewhere or {}).get(sha256))


def _hash_at(path: Path) -> str:
    try:
        return manifest_sha256(path) if (path / MANIFEST).is_file() else ""
    except (OSError, ValueError):  # no path of this machine
        return ""


def origins_of(path: Path, manifest: Manifest, seen: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """Return the artifacts that one was made from, and theirs, as far as they can be found.

    Args:
        path: the artifact.
        manifest: of it.
        seen: hashes of manifests that are not followed again.

    Returns:
        kind, path, state ("here", "as above", "changed since", or "not here") and made_from of each.

    Raises:
        UserError: a manifest on the way is damaged.
    """
    found, seen = list[dict[str, Any]](), set(seen)
    for item in inputs_of(path, manifest):
        sha256 = item["manifest_sha256"]
        place = find_input(item["path"], sha256, path)
        below: list[dict[str, Any]] = []
        if place is None:
            state = "changed since" if _hash_at(Path(item["path"])) else "not here"
        # one corpus may be an input of many: its own origins are listed once, or the tree grows without bound
        elif sha256 in seen:
            state = "as above"
        else:
            state = "here"
            if len(seen) < MAX_ORIGINS:
                below = origins_of(place, read_manifest(place), seen | {sha256})
        seen |= {sha256, *_hashes(below)}
        found.append({"kind": item["kind"], "path": str(place or item["path"]), "manifest_sha256": sha256,
                      "state": state, "made_from": below})
    return found


def _hashes(origins: list[dict[str, Any]]) -> Iterator[str]:
    for origin in origins:
        yield origin["manifest_sha256"]
        yield from _hashes(origin["made_from"])


def manifest_sha256(path: str | Path) -> str:
    """Return the hash of an artifact's manifest, which stands for the whole artifact."""
    return sha256_file(Path(path) / MANIFEST)


def damaged_files(path: str | Path, names: Iterable[str] | None = None, workers: int = 1,
                  done: Callable[[int], object] = lambda size_bytes: None) -> list[str]:
    """Return one sentence for each file of an artifact that is missing or differs from its manifest.

    Args:
        path: the artifact.
        names: the files to look at; None: all.
        workers: files that are hashed at a time.
        done: told the size of each file behind it, from any thread.
    """
    from concurrent.futures import ThreadPoolExecutor

    records = read_manifest(path).files

    def look(name: str) -> str | None:
        sentence = file_damage(Path(path) / name, records[name])
        done(records[name].size_bytes)
        return sentence

    with ThreadPoolExecutor(workers) as pool:
        return [sentence for sentence in pool.map(look, records if names is None else names) if sentence]


def file_damage(file: Path, record: FileRecord) -> str | None:
    if not file.is_file():
        return f"{file}: is missing"
    if file.stat().st_size != record.size_bytes:
        return f"{file}: has {file.stat().st_size} bytes, the manifest says {record.size_bytes}"
    return (None if file_digest(file, algorithm_of(record.digest)) == record.digest
            else f"{file}: its content differs from the hash in the manifest")
