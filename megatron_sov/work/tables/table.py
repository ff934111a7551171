"""A table: a folder that jobs on many machines write to and read from at once.

    TABLE/HEAD                            what all parts share
    TABLE/ROWS/NAME/                      a part: rows that one job has published
    TABLE/ADDED/VERSION/NAME/             columns that a later job has added to a part's rows
    TABLE/claims/                         who works on what, see `progress.locks`

A part is a Parquet file with a manifest.  It appears whole, by a rename, and never changes; of two of one
name the first one stays: whoever reads needs no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from megatron_sov.base.artifacts import (
    MANIFEST, Manifest, atomic_write, delete_folder, disk_errors, file_damage, fsync_path, is_held,
    manifest_sha256, new_artifact, read_manifest, rename_unless_taken, to_json)
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.outputs import refuse_nowhere

if TYPE_CHECKING:  # pyarrow takes long to import, and names of parts are wanted without it
    import pyarrow as pa

CLAIMS = "claims"
FORMAT_VERSION = 1
VERSION_CHARS = 12
"""Of a version, in the name of its folder."""
LEFTOVER_S = 3600.0
"""Seconds without a change after which a temporary folder is one that a killed job has left."""
KEPT_OUT = "num_kept_out"
_MAKE_AGAIN = "restore it from a copy, or delete it to have it made again"


class AlreadyPublished(UserError):
    """A part of this name was published first, with other rows: they stay, and the work on it is done."""


@dataclass(frozen=True)
class TablePart:
    """One part, as its manifest tells it."""

    name: str
    path: Path
    kind: str
    """Of its manifest: the table's `ROWS` or `ADDED`."""
    key: tuple[int, ...]
    """What its name says, see `Table.key_of`."""
    num_rows: int
    """With those that are kept out."""
    num_kept_out: int
    """Rows with a problem, which are not read."""
    manifest_sha256: str
    """Hash of the manifest, which stands for the whole part."""
    created_s: float
    """Unix time."""
    provenance: Mapping[str, Any]
    """What wrote it, as it says."""
    version: str = ""
    """Of added columns."""

    @property
    def file(self) -> Path:
        return self.path / f"{self.kind}.parquet"


@dataclass(frozen=True)
class Clearable:
    """A folder that can go, and why."""

    path: Path
    why: str
    size_bytes: int


P = TypeVar("P", bound=TablePart)


class Table(Generic[P]):
    """A table that exists; obtained from `open` or `create` of a subclass, which declares what it holds."""

    WHAT: ClassVar[str]
    """Name of such tables in messages."""
    HEAD: ClassVar[str]
    """File that says what all parts share."""
    ROWS: ClassVar[str]
    ADDED: ClassVar[str]
    """Kinds of parts: of their manifests, and in the names of folders and files."""
    VERSION: ClassVar[str]
    """In the manifest of added columns: the version of what added them."""
    CLAIM: ClassVar[str]
    """How a claim on adding columns begins."""
    IDENTITY: ClassVar[Mapping[str, type]]
    """What all parts share -> its type."""
    EXAMPLE: ClassVar[str]
    """Name of a part."""
    FIRST: ClassVar[str]
    """What the first number in it counts."""
    MADE_BY: ClassVar[str]
    """What to do where there is no table."""
    REPEATED: ClassVar[Collection[str]]
    """Leaves whose values repeat."""
    SPLIT: ClassVar[Collection[str]]
    """Leaves of floats whose bytes are sorted by their place."""
    PART: ClassVar[Any]

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self._told: set[str] = set()

    @staticmethod
    def key_of(name: str) -> tuple[int, ...] | None:
        """Return the numbers in a part's name, by which parts are sorted and of which the first one chooses
        them; None: it is the name of none."""
        raise NotImplementedError

    @staticmethod
    def tell(identity: Mapping[str, Any]) -> str:
        """Return what all parts share in words."""
        raise NotImplementedError

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return the table in a folder.

        Raises:
            UserError: there is none, or it is newer than this version reads.
        """
        file = Path(path) / cls.HEAD
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if raw["format_version"] > FORMAT_VERSION:
                raise UserError(f"{file}: format_version {raw['format_version']} is newer than "
                                f"{FORMAT_VERSION}, the newest that this version reads; update megatron-sov")
            identity = {name: raw[name] for name in cls.IDENTITY}
            if wrong := [name for name, kind in cls.IDENTITY.items() if type(identity[name]) is not kind]:
                raise ValueError(f"{wrong[0]} = {identity[wrong[0]]!r}")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: is no {cls.WHAT} (it has no {cls.HEAD}); {cls.MADE_BY}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{file}: is damaged ({e}); restore it from a copy") from None
        for name in (cls.ROWS, cls.ADDED, CLAIMS):  # a copy may lack those that were empty
            with contextlib.suppress(OSError):
                (Path(path) / name).mkdir(exist_ok=True)
        return cls(Path(path), identity)

    @classmethod
    def create(cls, path: str | Path, *identity: Any) -> Self:
        """Return the table in a folder, which is made where it is not there yet, also by several at once.

        Args:
            path: the folder.
            identity: values of `IDENTITY`.

        Raises:
            UserError: the table is one of another identity, or the folder is taken by something else.
        """
        path, wanted = Path(path), dict(zip(cls.IDENTITY, identity, strict=True))
        refuse_nowhere(path)
        if not (path / cls.HEAD).is_file():
            cls._make(path, wanted)
        found = cls.open(path)
        if found.identity != wanted:
            raise UserError(f"{path}: is a {cls.WHAT} of {cls.tell(found.identity)}, and this is of "
                            f"{cls.tell(wanted)}; choose another store")
        return found

    @classmethod
    def _make(cls, path: Path, identity: Mapping[str, Any]) -> None:
        """Make an empty table, unless another process is first."""
        # made whole under another name: of several that create the table one rename wins
        built = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
        with disk_errors(path):
            try:
                for name in (cls.ROWS, cls.ADDED, CLAIMS):
                    (built / name).mkdir(parents=True)
                atomic_write(built / cls.HEAD, to_json({"format_version": FORMAT_VERSION, **identity}))
                os.rename(built, path)
                fsync_path(path.parent)
            except OSError as e:
                # another process was first, which is as good
                if (path / cls.HEAD).is_file():
                    return
                if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise UserError(f"{path}: is not empty and no {cls.WHAT}; choose another folder"
                                    ) from None
                raise
            finally:
                shutil.rmtree(built, ignore_errors=True)

    @property
    def claims(self) -> Path:
        return self.path / CLAIMS

    def claim_of(self, name: str, version: str = "") -> str:
        """Return the name of the claim on a part, or on columns that a version adds to it."""
        return f"{self.CLAIM}-{version[:VERSION_CHARS]}-{name}" if version else name

    def part_path(self, name: str, version: str = "") -> Path:
        """Return the folder of a part, or of columns that a version adds to it, be it there or not."""
        if self.key_of(name) is None:
            raise ValueError(f"{name!r} is no name of a part ({self.EXAMPLE} is one)")
        return self._folder(version) / name

    def _folder(self, version: str) -> Path:
        if not re.fullmatch(r"[\w-]*", version):
            raise ValueError(f"version {version!r}: must be of letters, digits, '_' and '-'")
        return self.path / self.ADDED / version[:VERSION_CHARS] if version else self.path / self.ROWS

    def has(self, name: str, version: str = "") -> bool:
        """Return whether a part, or what a version adds to it, is published.

        Raises:
            UserError: it is there and torn, or of another table or version.
        """
        return self.part_path(name, version).exists() and self.part(name, version) is not None

    def part(self, name: str, version: str = "") -> P:
        """Return a part, or what a version adds to it; its rows are not looked at.

        Raises:
            UserError: it is not there, torn, or of another table or version.
        """
        path = self.part_path(name, version)
        # folders have the beginning of a version, manifests all of it: two may share the beginning
        part = self._opened(path, self.ADDED if version else self.ROWS)
        if part.version != version:
            raise UserError(f"{path}: is of {self.VERSION.replace('_', ' ')} {part.version!r}, whose first "
                            f"{VERSION_CHARS} characters are those of {version!r}; change that one's "
                            "settings")
        return part

    def versions(self) -> list[str]:
        return sorted(p.name for p in (self.path / self.ADDED).iterdir()
                      if p.is_dir() and not p.name.startswith("."))

    def parts(self, first: int | None = None, version: str = "",
              refused: Callable[[str], object] | None = None) -> list[P]:
        """Return the parts, sorted by key.

        Args:
            first: the first number of their keys; None: any.
            version: of added columns, or the name of its folder; "": the rows themselves.
            refused: is told what is none of the table's parts; None: a warning, once.
        """
        folder, kind = self._folder(version), self.ADDED if version else self.ROWS
        names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
        found = []
        for key, name in sorted((self.key_of(name) or (), name) for name in names):
            if key and first not in (None, key[0]):
                continue
            try:
                found.append(self._opened(folder / name, kind))
            except UserError as e:
                (refused or self._warn_once)(str(e))
        return found

    def _warn_once(self, problem: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            warn(f"kept out: {problem}")

    def _opened(self, path: Path, kind: str) -> P:
        key = self.key_of(path.name)
        if key is None:
            raise UserError(f"{path}: is no part of the store, whose names are as {self.EXAMPLE}; move it "
                            "away")
        manifest = read_manifest(path, kind)
        if problem := self._problem(path, manifest):
            raise UserError(f"{path}: {problem}; {_MAKE_AGAIN}")
        content = manifest.content
        part: P = self.PART(path.name, path, kind, key, content["num_rows"], content.get(KEPT_OUT, 0),
                              manifest_sha256(path), manifest.created_s, manifest.settings,
                              content.get(self.VERSION, ""))
        return part

    def _problem(self, path: Path, manifest: Manifest) -> str:
        """Return what is wrong with a part as far as its manifest and the sizes of its files tell."""
        content, name, table = manifest.content, f"{manifest.kind}.parquet", manifest.content.get("store")
        # a part that was copied from another store would be trained on without a word
        if table != self.identity:
            told = self.tell(table) if isinstance(table, Mapping) else "of none"
            return f"belongs to another store ({told}; this one: {self.tell(self.identity)})"
        if list(manifest.files) != [name]:
            return f"has the files {', '.join(manifest.files) or 'none'}, must have {name} alone"
        counts = [content.get("num_rows"), content.get(KEPT_OUT, 0)]
        if not all(type(count) is int and count >= 0 for count in counts):
            return f"{MANIFEST} has num_rows = {counts[0]!r} and {KEPT_OUT} = {counts[1]!r}"
        if not isinstance(content.get(self.VERSION, ""), str):
            return f"{MANIFEST} has no text as {self.VERSION}"
        file = path / name
        size_bytes = file.stat().st_size if file.is_file() else 0
        wanted = manifest.files[name].size_bytes
        return f"{name} has {size_bytes:,} bytes, must have {wanted:,}" if size_bytes != wanted else ""

    def read(self, part: P, schema: pa.Schema) -> pa.Table:
        """Return columns of a part's rows, whose bytes are checked against its manifest first.

        Raises:
            UserError: the file is damaged, too large, or none that the table wrote.
        """
        from megatron_sov.work.tables.parquet import read_table

        record = read_manifest(part.path).files[part.file.name]
        if damage := file_damage(part.file, record):
            raise UserError(f"{damage}; restore it from a copy, or delete {part.path} to have it made again")
        table = read_table(part.file, schema)
        if table.num_rows != part.num_rows:
            raise UserError(f"{part.file}: has {table.num_rows:,} rows, its manifest says "
                            f"{part.num_rows:,}")
        return table

    def publish(self, name: str, version: str, table: pa.Table, provenance: Mapping[str, Any],
                num_kept_out: int | None = None) -> bool:
        """Publish a part; returns whether it is there by this call, False where one of that name was first.

        Args:
            name: of the part.
            version: of what adds columns to it; "": it is rows.
            table: its rows.
            provenance: JSON values: what wrote it.
            num_kept_out: rows of them with a problem.

        Raises:
            UserError: the rows are too many, or the disk refuses; nothing is left of it.
        """
        from megatron_sov.work.tables.parquet import table_problem, write_table

        path, kind = self.part_path(name, version), self.ADDED if version else self.ROWS
        if problem := table_problem(table):
            raise UserError(f"{path}: {problem}")
        # a name of its own: two writers, on whatever machines, meet in the last rename alone
        built = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
        with disk_errors(path):
            try:
                with new_artifact(built, kind) as artifact:
                    has = set(table.column_names)
                    repeated = [leaf for leaf in self.REPEATED if leaf.split(".")[0] in has]
                    split = [leaf for leaf in self.SPLIT if leaf.split(".")[0] in has]
                    write_table(artifact.path / f"{kind}.parquet", table, repeated, split)
                    artifact.content = {
                        "num_rows": table.num_rows,
                        **({self.VERSION: version} if version else {KEPT_OUT: num_kept_out or 0}),
                        "store": self.identity}
                    artifact.settings = dict(provenance)
                return rename_unless_taken(built, path)
            except UserError as e:  # the name that it was built under means nothing to anyone
                raise UserError(str(e).replace(str(built), str(path))) from None
            finally:
                shutil.rmtree(built, ignore_errors=True)

    def clearable(self, versions: Collection[str] = (), firsts: Collection[int] = ()) -> list[Clearable]:
        """Return what can go: leftovers of killed jobs, claims on what is done, and what is named.

        Args:
            versions: whose added columns can go, by their version or the name of their folder.
            firsts: first numbers of the keys of parts that can go, with all that was added to them.
        """
        folders = {version[:VERSION_CHARS] for version in versions} & set(self.versions())
        found = []
        for path, why in self._clearable(folders, firsts):
            size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Clearable(path, why, size_bytes))
        return found

    def _clearable(self, folders: set[str], firsts: Collection[int]) -> Iterator[tuple[Path, str]]:
        kept = ["", *(folder for folder in self.versions() if folder not in folders)]
        for folder in (self.path / self.ADDED, self.claims, *map(self._folder, kept)):
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") and _is_left(path):
                    yield path, "a killed job left it"
        # claims on what is published protect nothing any more
        done = set()
        for version in kept:
            for path in sorted(self._folder(version).iterdir()):
                if (path / MANIFEST).is_file():
                    done.add(self.claim_of(path.name, version))
                key = self.key_of(path.name)
                if key is not None and key[0] in firsts:
                    yield path, f"of {self.FIRST} {key[0]}"
        for version in folders:
            done |= {self.claim_of(path.name, version) for path in self._folder(version).iterdir()}
            yield self._folder(version), "of that version"
        yield from ((path, "what it claims is done") for path in sorted(self.claims.iterdir())
                    if path.name in done)


def clear(found: Collection[Clearable]) -> None:
    """Delete what can go; what is half deleted has no name that anyone reads.

    Raises:
        UserError: it may not be deleted.
    """
    for item in found:
        hidden = item.path.with_name(f".{item.path.name}.gone-{uuid.uuid4().hex}")
        with disk_errors(item.path), contextlib.suppress(FileNotFoundError):  # another one cleared it
            delete_folder(item.path, hidden)


def _is_left(folder: Path) -> bool:
    """Return whether nobody works in a temporary folder any more, as far as can be known: a writer holds it,
    where the disk knows locks, and changes it all the time."""
    # a writer at work; where locks are unknown, the time of the last change decides
    if is_held(folder):
        return False
    try:
        newest_s = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # it is being renamed, or deleted
        return False
    return ".gone-" in folder.name or time.time() - newest_s > LEFTOVER_S
