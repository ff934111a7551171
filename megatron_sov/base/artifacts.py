"""Artifacts: folders with a hashed `manifest.json`, written atomically.

A tokenizer, a set of token shards or a checkpoint is a folder whose manifest lists the format version, the
hash of every file, the settings and the manifests of its inputs. A writer fills a temporary folder, syncs it
to disk and renames it; half-written artifacts therefore never exist under the final name.
"""

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
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import SHA256, hash_file, parse_digest_algorithm
from megatron_sov.base.errors import (
    IS_CHECKING, Fix, UserError, choose_free_path, fix_missing, stop_check, suggest_download)
from megatron_sov.base.outputs import check_creatable, resolve_link

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
PRODUCERS = {"corpus": "`sov-data run` or `sov-data demo-corpus`",
             "tokenizer": "`sov-tokenizer train` or `sov-tokenizer import`",
             "tokens": "`sov-data pack` or `sov-data mix`",
             "rows": "`megatron-sov map`",
             "scorer": "`sov-data scorer train`",
             "difficulty_labels": "`sov-data difficulty label`",
             "synthesis": "`sov-data synth`",
             "teacher_states": "`megatron-sov distill states`",
             "codec": "`megatron-sov codec import`",
             "checkpoint": "a run (RUN/checkpoints/step-N) or `megatron-sov convert from-hf`"}
"""Artifact kind -> commands that write the kind."""
MAX_ORIGINS = 200
"""Limit on the manifests whose inputs `trace_origins` lists."""
_NO_HASH = "0" * 64
"""Placeholder for a manifest's own hash, which the hash covers in place of itself."""
_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "larger than the limit on file sizes (ulimit -f)"}


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file's digest and size in the manifest."""

    digest: str
    """Content digest, "blake3:HEX" or "sha256:HEX" (`digests.py`)."""
    size_bytes: int

    @staticmethod
    def read(raw: dict[str, Any]) -> "FileRecord":
        """Parse a file's entry in `manifest.json`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the entry is malformed.
        """
        parse_digest_algorithm(raw["digest"])
        return FileRecord(raw["digest"], raw["size_bytes"])

    @staticmethod
    def of(file: Path) -> "FileRecord":
        return FileRecord(hash_file(file), file.stat().st_size)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An artifact's `manifest.json`."""

    kind: str
    """Artifact type: "tokens", "checkpoint" and others, mostly keys of `PRODUCERS`."""
    content: dict[str, Any]
    """Counts and metadata for readers."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """`kind`, `path` and `manifest_sha256` per source artifact."""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """Relative path -> digest and size, for every file except the manifest."""
    created_s: float = 0.0
    """Unix time at completion."""
    format_version: int = FORMAT_VERSION
    """Manifest format version; readers refuse newer versions."""
    sha256: str = ""
    """SHA-256 of `manifest.json` with zeros for `sha256`; "": written by hand. Must stay the last field."""


def sha256_file(path: Path) -> str:
    return hash_file(path, SHA256).removeprefix(f"{SHA256}:")


def fsync_path(path: Path) -> None:
    """Flush a file or folder to disk: a later rename must not become durable before the bytes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: str | bytes, *, create_parents: bool = False) -> None:
    """Replace the content of `path` atomically: readers see the old or the new bytes, never a mixture. Raises
    `UserError`: the disk is full or the folder is not writable."""
    with create_file(Path(path), create_parents=create_parents) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def create_file(path: Path, *, create_parents: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success, sync the file and rename it to `path`.

    Args:
        path: the final file; an existing one is replaced.
        create_parents: create missing parent folders.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    stop_check()
    temporary = _get_temporary_path(path)
    with translate_disk_errors(path):
        if create_parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # sync before the rename: after a power cut `path` holds the old file or the whole new one
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
            # a rename is durable only after its folder is synced
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def create_folder(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`; on success, sync its files and rename it to `path`.

    Args:
        keep_existing: keep a folder that exists at `path` when the new one is complete (another process wrote
            the same content); otherwise replace it.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    temporary = _get_temporary_path(path)
    with translate_disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same PID
            temporary.mkdir(parents=True)
            yield temporary
            # sync files and sub-folders before the rename below
            for file in temporary.rglob("*"):
                fsync_path(file)
            if keep_existing:
                rename_unless_taken(temporary, path)
            else:
                publish_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def rename_unless_taken(built: Path, path: Path) -> bool:
    """Rename a folder to `path`; if `path` exists, change nothing and return False."""
    try:
        # rename(2) refuses a non-empty target: exactly one of two writers succeeds
        os.rename(built, path)
    except OSError:
        if not path.is_dir():
            raise
        return False
    fsync_path(path.parent)
    return True


def delete_folder(path: Path, hidden: Path) -> None:
    """Rename a folder to `hidden`, then delete: a kill leaves no half-deleted folder under the old name.
    Raises `FileNotFoundError`: another process deleted it first."""
    # the rename is atomic; the deletion may be interrupted at any file
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _get_temporary_path(path: Path) -> Path:
    # the host is in the name because several machines may write to one folder, and a file has no lock
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")


def write_output(path: Path, data: str | bytes) -> None:
    """Write a command's result to `path`, creating missing parent folders. Raises `UserError`: the disk is
    full or a folder is not writable."""
    write_atomically(path, data, create_parents=True)


def try_lock(fd: int) -> bool | None:
    """Lock an open file or folder until it is closed; return False if another process holds the lock.

    None: unknown, because the file system has no such locks (Lustre mounted without `flock`, NFS folders).
    """
    try:
        # the kernel releases the lock when the process ends, even by SIGKILL
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_locked(folder: Path) -> bool | None:
    """Return whether any process (also on another machine) locks a folder; None if unknown."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # the folder is gone, or `folder` is a file
        return False
    try:
        is_free = try_lock(fd)
        return None if is_free is None else not is_free
    finally:
        os.close(fd)


@contextlib.contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a read-only file system into a `UserError` about `path`."""
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


def format_json(value: Any) -> str:
    """Serialise dataclasses and plain values as indented JSON; floats keep every bit."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=_to_plain) + "\n"


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


class ArtifactWriter:
    """An artifact under construction; obtained from `create_artifact`."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        """Temporary folder for the files."""
        self.kind = kind
        self.content: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.inputs: list[dict[str, str]] = []
        self.hashed_files: dict[str, FileRecord] = {}
        """Files with a digest computed while writing; `complete` hashes the remaining files."""
        self.excluded_names: frozenset[str] = frozenset()
        """Excluded names directly inside the folder."""

    def add_input(self, path: Path, *, for_export: bool = False) -> None:
        """Record `path` as an input; by folder name alone if `for_export` (for other machines)."""
        name = path.resolve().name if for_export else str(path)
        self.inputs.append({"kind": read_manifest(path).kind, "path": name,
                            "manifest_sha256": manifest_sha256(path)})

    def complete(self) -> None:
        """Hash and sync every file, then write the manifest (still in the temporary folder)."""
        files = dict(self.hashed_files)
        # sorted: manifests list files in the same order on every file system
        top_level = [p for p in sorted(self.path.iterdir()) if p.name not in self.excluded_names]
        entries = [p for top in top_level for p in ([top, *top.rglob("*")] if top.is_dir() else [top])]
        for file in sorted(p for p in entries if p.is_file()):
            name = file.relative_to(self.path).as_posix()
            if name not in files:
                files[name] = FileRecord.of(file)
            fsync_path(file)
        for folder in (p for p in entries if p.is_dir()):
            fsync_path(folder)
        manifest = Manifest(self.kind, self.content, settings=self.settings, inputs=self.inputs, files=files,
                            created_s=time.time(), sha256=_NO_HASH)
        # replace the placeholder by the hash; `sha256` is the last field, hence the last run of zeros
        head, _, tail = format_json(manifest).rpartition(_NO_HASH)
        sha256 = _hash_around(head.encode(), tail.encode())
        write_atomically(self.path / MANIFEST, head + sha256 + tail)


def _hash_around(head: bytes, tail: bytes) -> str:
    """Return the hash of a manifest, given the text before and after the value of `sha256`."""
    return hashlib.sha256(head + _NO_HASH.encode() + tail).hexdigest()


@contextlib.contextmanager
def create_artifact(path: str | Path, kind: str, *, overwrite: bool = False) -> Iterator[ArtifactWriter]:
    """Build an artifact in a temporary folder next to `path`; `path` appears only when complete. `kind`: the
    manifest's `kind`; `overwrite`: replace an existing artifact of the same kind. Raises `UserError`: `path`
    exists and must not be replaced, or the disk is full or not writable."""
    # the temporary folder must be on the final folder's disk: renames do not cross disks
    path = resolve_link(Path(path))
    check_creatable(path)
    check_output_folder(path, kind, overwrite)
    stop_check()  # a dry run ends here
    # unlike `_get_temporary_path` without the host: a lock shows whether the folder is in use
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with translate_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # before the temporary folder exists, which would itself look like a leftover
        clear_leftovers(path)
        check_output_folder(path, kind, overwrite)  # again: an old artifact may have been restored
        with _create_locked_folder(temporary, path):
            try:
                writer = ArtifactWriter(temporary, kind)
                yield writer
                writer.complete()
                publish_folder(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _create_locked_folder(temporary: Path, path: Path) -> Iterator[None]:
    """Create a temporary folder and lock it during the block. Other machines and containers cannot look up
    the PID in its name, and would delete it as a leftover if it were unlocked."""
    try:
        temporary.mkdir()
    except FileExistsError:  # processes in different containers may have the same PID
        raise UserError(f"{path}: another process is making it; wait for it, choose another output folder, "
                        f"or delete {temporary} if it is what a killed one left") from None
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try_lock(fd)
        yield
    finally:
        os.close(fd)


def publish_folder(temporary: Path, path: Path) -> None:
    """Rename a complete folder to the final name; an existing artifact is first moved aside, then deleted."""
    old = None
    if path.exists():
        # between the two renames no folder has the final name; after a kill, `clear_leftovers` restores the
        # old artifact
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
    os.rename(temporary, path)
    fsync_path(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def check_output_folder(path: Path, kind: str, overwrite: bool) -> None:
    """Raise `UserError` if `path` cannot become an output folder, and remove an empty folder at `path`.

    Without `overwrite`, `path` must not exist or be empty. With it, only an artifact of `kind` is replaced.
    """
    is_link, path = os.path.islink(path), resolve_link(path)
    check_creatable(path)
    if not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        if not (is_link or IS_CHECKING.get()):
            path.rmdir()
        return
    is_ours = (path / MANIFEST).is_file() and read_manifest(path).kind == kind
    if not overwrite:
        alternative = ", or pass --overwrite to replace it" if is_ours else ""
        raise UserError(f"{path}: already exists; choose another output folder{alternative}",
                        Fix(words={str(path): choose_free_path(str(path))}))
    if not is_ours:
        raise UserError(f"{path}: exists and is not a '{kind}' artifact, so it is not replaced; "
                        "choose another output folder", Fix(words={str(path): choose_free_path(str(path))}))


def clear_leftovers(path: Path) -> None:
    """Delete temporary folders of killed processes next to `path`, and restore a moved-aside artifact."""
    name = glob.escape(path.name)
    for leftover in sorted([*path.parent.glob(f".{name}.tmp-*"), *path.parent.glob(f".{name}.old-*")]):
        stem, _, pid = leftover.name.rpartition("-")
        if not pid.isdecimal() or not _is_leftover(leftover, int(pid)):
            continue
        # `publish_folder` was killed between its two renames: the old artifact is the only copy
        if stem.endswith(".old") and not path.exists():
            os.rename(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_leftover(folder: Path, pid: int) -> bool:
    """Return whether no process uses a temporary folder any more; `pid`: the creator's PID, from its name."""
    # the lock is more reliable than the PID, which may belong to another container or machine
    locked = is_locked(folder)  # None: unknown
    if pid == os.getpid():  # the PID of an earlier start of this container, or of a process in another one
        return locked is False  # delete only if certainly unlocked
    return not locked and _has_ended(pid)  # if unknown, the PID decides


def _has_ended(pid: int) -> bool:
    """Return whether a process has ended; zombies count as ended."""
    import psutil  # not at the top: it is slow to import, and few commands find a leftover

    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return not psutil.pid_exists(pid)


def read_manifest(path: str | Path, kind: str | None = None) -> Manifest:
    """Read an artifact's manifest. Raises `UserError`: it is missing, damaged, newer, or not of `kind`."""
    file = Path(path) / MANIFEST
    try:
        # opening a named pipe would wait for its writer
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")
        written = file.read_bytes()
        raw = json.loads(written.decode())
        # check the version before the fields: another format is not damage
        if (version := raw["format_version"]) != FORMAT_VERSION:
            fix = "update megatron-sov" if version > FORMAT_VERSION else "make the folder again"
            raise UserError(f"{file}: has format_version {version}, not {FORMAT_VERSION}; {fix}")
        files = {name: FileRecord.read(record) for name, record in raw.pop("files").items()}
        # readers join these names to paths, and the manifest may come from a stranger
        if outside := [name for name in files if not is_inside(name)]:
            raise ValueError(f"it names the file {outside[0]!r}, which is not inside the folder")
        manifest = Manifest(files=files, **raw)
        if manifest.sha256 != "":
            # hash the bytes as written: JSON that was parsed and written again could differ
            head, _, tail = written.rpartition(manifest.sha256.encode())
            if _hash_around(head, tail) != manifest.sha256:
                raise ValueError("its content differs from its own hash")
    except (FileNotFoundError, NotADirectoryError):
        expected = f"a '{kind}' artifact" if kind else "an artifact"
        if not Path(path).exists():
            raise UserError(f"{path}: does not exist, so it is not {expected}; check the path"
                            f"{suggest_download(path)}", fix_missing(path)) from None
        # inside an artifact, or a folder in the cache of the Hugging Face hub
        near = sorted(Path(path).glob("snapshots/*"))
        if (Path(path).parent / MANIFEST).is_file():
            near.append(Path(path).parent)
        raise UserError(f"{path}: has no {MANIFEST}, so it is not {expected}; "
                        f"pass the folder that {PRODUCERS.get(kind or '', 'the earlier step')} "
                        "wrote", Fix(words={str(path): str(near[-1])}) if near else None) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as e:
        raise UserError(f"{file}: is damaged ({e}); make it again or restore it from a copy") from None
    if kind is not None and manifest.kind != kind:
        origins = re.findall(r"'path': '(.+?)'", str(manifest.settings.get("inputs")))  # of token shards
        if kind == "rows" and origins and Path(origins[0]).exists():
            raise UserError(f"{path}: is a '{manifest.kind}' artifact, made of {origins[0]}, and rows of "
                            f"text are needed; pass {origins[0]}", Fix(words={str(path): origins[0]}))
        raise UserError(f"{path}: is a '{manifest.kind}' artifact where a '{kind}' artifact is needed; "
                        f"pass the folder that {PRODUCERS.get(kind, 'the earlier step')} wrote")
    return manifest


def is_inside(name: str) -> bool:
    """Return whether a relative path from a manifest stays inside the artifact's folder."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def parse_inputs(path: Path, manifest: Manifest) -> list[dict[str, str]]:
    """Return `kind`, `path` and `manifest_sha256` per input artifact. Raises `UserError`: one is missing."""
    inputs: list[Any] = list(manifest.inputs)
    for item in inputs:
        is_complete = isinstance(item, dict) and all(
            isinstance(item.get(key), str) for key in ("kind", "path", "manifest_sha256"))
        if not is_complete:
            raise UserError(f"{path / MANIFEST}: is damaged (an input without kind, path or hash); make "
                            "the artifact again or restore it from a copy")
    return inputs


def list_input_paths(path: str, owner: Path) -> list[Path]:
    """List the paths where an input may exist now: `path` itself, or next to `owner`, the artifact or run
    built from it: its relative path, its bare name, or the last three parts of its path."""
    folder = owner.parent
    return [Path(path), folder / path, folder / Path(path).name, folder / Path(*Path(path).parts[-3:])]


def find_input(path: str, sha256: str, owner: Path) -> Path | None:
    """Return the current path of an input with unchanged manifest, else None.

    Args:
        path: the path recorded by the artifact or run.
        sha256: hash of the input's manifest.
        owner: the artifact or run built from the input.
    """
    for candidate in list_input_paths(path, owner):
        if _hash_manifest_at(candidate) == sha256:
            return candidate
    return None


def _hash_manifest_at(path: Path) -> str:
    try:
        return manifest_sha256(path) if (path / MANIFEST).is_file() else ""
    except (OSError, ValueError):  # not a valid path on this machine
        return ""


def trace_origins(path: Path, manifest: Manifest, seen: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """Return an artifact's inputs and, recursively, the inputs of existing inputs.

    Args:
        seen: hashes of manifests whose inputs are already listed.

    Returns:
        For each input: `kind`, `path`, `state` ("here", "as above", "changed since" or "not here") and
        `made_from`, its own inputs.

    Raises:
        UserError: a manifest among the inputs is damaged.
    """
    origins: list[dict[str, Any]] = []
    seen = set(seen)
    for item in parse_inputs(path, manifest):
        sha256 = item["manifest_sha256"]
        place = find_input(item["path"], sha256, path)
        below: list[dict[str, Any]] = []
        if place is None:
            state = "changed since" if _hash_manifest_at(Path(item["path"])) else "not here"
        # list a shared corpus's inputs once, or the tree grows without bound
        elif sha256 in seen:
            state = "as above"
        else:
            state = "here"
            if len(seen) < MAX_ORIGINS:
                below = trace_origins(place, read_manifest(place), seen | {sha256})
        seen |= {sha256, *_iter_hashes(below)}
        origins.append({"kind": item["kind"], "path": str(place or item["path"]), "manifest_sha256": sha256,
                        "state": state, "made_from": below})
    return origins


def _iter_hashes(origins: list[dict[str, Any]]) -> Iterator[str]:
    for origin in origins:
        yield origin["manifest_sha256"]
        yield from _iter_hashes(origin["made_from"])


def manifest_sha256(path: str | Path) -> str:
    """Return the SHA-256 of `manifest.json`, which identifies the artifact."""
    return sha256_file(Path(path) / MANIFEST)


def find_damaged_files(path: str | Path, names: Iterable[str] | None = None, workers: int = 1,
                       on_checked: Callable[[int], object] = lambda size_bytes: None) -> list[str]:
    """Return a sentence per file that is missing or differs from the manifest.

    Args:
        names: the files to check; None: all.
        workers: number of hashing threads.
        on_checked: called with each checked file's size in bytes, from any thread.
    """
    records = read_manifest(path).files

    def check_file(name: str) -> str | None:
        sentence = find_file_damage(Path(path) / name, records[name])
        on_checked(records[name].size_bytes)
        return sentence

    with ThreadPoolExecutor(workers) as pool:
        sentences = pool.map(check_file, records if names is None else names)
        return [sentence for sentence in sentences if sentence]


def find_file_damage(file: Path, record: FileRecord) -> str | None:
    """Return a sentence if a file is missing or differs from its record, else None."""
    if not file.is_file():
        return f"{file}: is missing"
    if file.stat().st_size != record.size_bytes:
        return f"{file}: has {file.stat().st_size} bytes, the manifest says {record.size_bytes}"
    if hash_file(file, parse_digest_algorithm(record.digest)) != record.digest:
        return f"{file}: its content differs from the hash in the manifest"
    return None
