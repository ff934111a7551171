"""A table: a folder that jobs on many machines write and read concurrently.

    TABLE/HEAD                            values shared by all parts
    TABLE/ROWS/NAME/                      a part: rows published by a job
    TABLE/ADDED/VERSION/NAME/             columns that a later job added to a part
    TABLE/claims/                         claims of running jobs, see `progress.locks`

A part is a Parquet file with a manifest. It appears by a rename and never changes; if two jobs publish the
same part, the first stays. Readers need no lock.
"""

from __future__ import annotations

import contextlib
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
    MANIFEST, Manifest, create_artifact, delete_folder, find_file_damage, format_json, is_locked,
    manifest_sha256, read_manifest, rename_unless_taken, translate_disk_errors, write_atomically)
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.outputs import check_creatable

if TYPE_CHECKING:  # pyarrow takes long to import, and names of parts are wanted without it
    import pyarrow as pa

CLAIMS = "claims"
FORMAT_VERSION = 1
VERSION_CHARS = 12
"""Length of a version in its folder's name."""
LEFTOVER_S = 3600.0
"""Minimum age in seconds of an abandoned temporary folder."""
EXCLUDED_FIELD = "num_kept_out"
_REBUILD_HINT = "restore it from a copy, or delete it to have it made again"


class AlreadyPublished(UserError):
    """A part with the same name exists already; the published rows stay."""


@dataclass(frozen=True)
class TablePart:
    """A published part, described by its manifest."""

    name: str
    path: Path
    kind: str
    """Kind in the manifest: the table's `ROWS` or `ADDED`."""
    key: tuple[int, ...]
    """Numbers in the part's name, see `Table.key_of`."""
    num_rows: int
    """Number of rows, including excluded ones."""
    num_excluded: int
    """Rows with a problem, which readers skip."""
    manifest_sha256: str
    """Hash of the manifest, which identifies the whole part."""
    created_s: float
    provenance: Mapping[str, Any]
    """Description of the program that wrote the part."""
    version: str = ""

    @property
    def file(self) -> Path:
        return self.path / f"{self.kind}.parquet"


@dataclass(frozen=True)
class DeletableFolder:
    path: Path
    why: str
    size_bytes: int


P = TypeVar("P", bound=TablePart)


class Table(Generic[P]):
    """An existing table, from `open` or `create` of a subclass with a declared schema."""

    NOUN: ClassVar[str]
    """Noun for messages."""
    HEAD: ClassVar[str]
    """Name of the file with values shared by all parts."""
    ROWS: ClassVar[str]
    ADDED: ClassVar[str]
    """Kinds of parts, in manifests and in names of folders and files."""
    VERSION: ClassVar[str]
    """Manifest field of added columns: version of the writing program."""
    CLAIM: ClassVar[str]
    """Prefix of claims on adding columns."""
    IDENTITY: ClassVar[Mapping[str, type]]
    """Name of a shared value -> its type."""
    EXAMPLE: ClassVar[str]
    """Example of a part's name."""
    FIRST: ClassVar[str]
    """Noun for the first number in a part's name."""
    CREATE_HINT: ClassVar[str]
    """Hint for a missing table."""
    REPEATED: ClassVar[Collection[str]]
    """Leaf columns with repeated values."""
    SPLIT: ClassVar[Collection[str]]
    """Float leaf columns with split bytes."""
    PART: ClassVar[Any]

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self._told: set[str] = set()

    @staticmethod
    def key_of(name: str) -> tuple[int, ...] | None:
        """Parse the numbers in a part's name (the sort key); None for invalid names.

        The first number selects parts in `parts` and `clearable`.
        """
        raise NotImplementedError

    @staticmethod
    def tell(identity: Mapping[str, Any]) -> str:
        raise NotImplementedError

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the table in a folder. Raises `UserError`: no table, or one of a newer version."""
        file = Path(path) / cls.HEAD
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if raw["format_version"] > FORMAT_VERSION:
                raise UserError(f"{file}: format_version {raw['format_version']} is newer than "
                                f"{FORMAT_VERSION}, the newest that this version reads; update megatron-sov")
            identity = {name: raw[name] for name in cls.IDENTITY}
            if mistyped := [name for name, kind in cls.IDENTITY.items() if type(identity[name]) is not kind]:
                raise ValueError(f"{mistyped[0]} = {identity[mistyped[0]]!r}")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: is no {cls.NOUN} (it has no {cls.HEAD}); {cls.CREATE_HINT}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{file}: is damaged ({e}); restore it from a copy") from None
        for name in (cls.ROWS, cls.ADDED, CLAIMS):  # copying may have dropped empty folders
            with contextlib.suppress(OSError):
                (Path(path) / name).mkdir(exist_ok=True)
        return cls(Path(path), identity)

    @classmethod
    def create(cls, path: str | Path, *identity: Any) -> Self:
        """Open or create the table in a folder; safe for concurrent calls.

        Args:
            path: the folder.
            identity: values of `IDENTITY`.

        Raises:
            UserError: the table has another identity, or the folder contains something else.
        """
        path, expected = Path(path), dict(zip(cls.IDENTITY, identity, strict=True))
        check_creatable(path)
        if not (path / cls.HEAD).is_file():
            cls._create_folder(path, expected)
        table = cls.open(path)
        if table.identity != expected:
            raise UserError(f"{path}: is a {cls.NOUN} of {cls.tell(table.identity)}, and this is of "
                            f"{cls.tell(expected)}; choose another store")
        return table

    @classmethod
    def _create_folder(cls, path: Path, identity: Mapping[str, Any]) -> None:
        """Create an empty table, unless another process is faster."""
        # Build under a temporary name: if several processes create the table, a single rename succeeds.
        temporary = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
        with translate_disk_errors(path):
            try:
                for name in (cls.ROWS, cls.ADDED, CLAIMS):
                    (temporary / name).mkdir(parents=True)
                write_atomically(temporary / cls.HEAD,
                                 format_json({"format_version": FORMAT_VERSION, **identity}))
                is_new = rename_unless_taken(temporary, path)
            except NotADirectoryError:  # `path` is a file
                is_new = False
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        if not is_new and not (path / cls.HEAD).is_file():
            raise UserError(f"{path}: is not empty and no {cls.NOUN}; choose another folder")

    @property
    def claims(self) -> Path:
        return self.path / CLAIMS

    def claim_name(self, name: str, version: str = "") -> str:
        return f"{self.CLAIM}-{version[:VERSION_CHARS]}-{name}" if version else name

    def part_path(self, name: str, version: str = "") -> Path:
        """Return the folder of a part or of a version's columns, published or not."""
        if self.key_of(name) is None:
            raise ValueError(f"{name!r} is not a part name (example: {self.EXAMPLE})")
        return self._version_folder(version) / name

    def _version_folder(self, version: str) -> Path:
        if not re.fullmatch(r"[\w-]*", version):
            raise ValueError(f"version {version!r}: must be of letters, digits, '_' and '-'")
        return self.path / self.ADDED / version[:VERSION_CHARS] if version else self.path / self.ROWS

    def has_part(self, name: str, version: str = "") -> bool:
        """Return whether a part, or a version's columns for it, is published. Raises `UserError`: the part is
        damaged, or belongs to another table or version."""
        return self.part_path(name, version).exists() and self.part(name, version) is not None

    def part(self, name: str, version: str = "") -> P:
        """Open a part, or a version's columns for it, without reading rows. Raises `UserError`: the part is
        missing or damaged, or belongs to another table or version."""
        path = self.part_path(name, version)
        # folder names truncate versions, manifests do not: two versions may share a folder name
        part = self._open_part(path, self.ADDED if version else self.ROWS)
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
        """Return the published parts, sorted by key.

        Args:
            first: required first number of the key; None: any.
            version: version of added columns or its folder's name; "": the rows.
            refused: called with a message per damaged part; None: warn once.
        """
        folder, kind = self._version_folder(version), self.ADDED if version else self.ROWS
        names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
        parts = []
        for key, name in sorted((self.key_of(name) or (), name) for name in names):
            if key and first not in (None, key[0]):
                continue
            try:
                parts.append(self._open_part(folder / name, kind))
            except UserError as e:
                (refused or self._warn_once)(str(e))
        return parts

    def _warn_once(self, problem: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            warn(f"skipped: {problem}")

    def _open_part(self, path: Path, kind: str) -> P:
        key = self.key_of(path.name)
        if key is None:
            raise UserError(f"{path}: is not a part of the store (part names look like "
                            f"{self.EXAMPLE}); move it away")
        manifest = read_manifest(path, kind)
        if problem := self._find_problem(path, manifest):
            raise UserError(f"{path}: {problem}; {_REBUILD_HINT}")
        content = manifest.content
        part: P = self.PART(path.name, path, kind, key, content["num_rows"], content.get(EXCLUDED_FIELD, 0),
                            manifest_sha256(path), manifest.created_s, manifest.settings,
                            content.get(self.VERSION, ""))
        return part

    def _find_problem(self, path: Path, manifest: Manifest) -> str:
        """Return a problem visible in a part's manifest or file size, or ""."""
        content, name, table = manifest.content, f"{manifest.kind}.parquet", manifest.content.get("store")
        # a part copied from another store would silently enter training
        if table != self.identity:
            owner = self.tell(table) if isinstance(table, Mapping) else "of none"
            return f"belongs to another store ({owner}; this one: {self.tell(self.identity)})"
        if list(manifest.files) != [name]:
            return f"has the files {', '.join(manifest.files) or 'none'}, must have {name} alone"
        counts = [content.get("num_rows"), content.get(EXCLUDED_FIELD, 0)]
        if not all(type(count) is int and count >= 0 for count in counts):
            return f"{MANIFEST} has num_rows = {counts[0]!r} and {EXCLUDED_FIELD} = {counts[1]!r}"
        if not isinstance(content.get(self.VERSION, ""), str):
            return f"{MANIFEST} has no text as {self.VERSION}"
        file = path / name
        size_bytes = file.stat().st_size if file.is_file() else 0
        expected_bytes = manifest.files[name].size_bytes
        if size_bytes != expected_bytes:
            return f"{name} has {size_bytes:,} bytes, must have {expected_bytes:,}"
        return ""

    def read(self, part: P, schema: pa.Schema) -> pa.Table:
        """Read columns of a part after checking its hash. Raises `UserError`: the file is damaged, too large,
        or not written by the table."""
        from megatron_sov.work.tables.parquet import read_table  # imports pyarrow, as above

        record = read_manifest(part.path).files[part.file.name]
        if damage := find_file_damage(part.file, record):
            raise UserError(f"{damage}; restore it from a copy, or delete {part.path} to have it made again")
        table = read_table(part.file, schema)
        if table.num_rows != part.num_rows:
            raise UserError(f"{part.file}: has {table.num_rows:,} rows, its manifest says {part.num_rows:,}")
        return table

    def publish(self, name: str, version: str, table: pa.Table, provenance: Mapping[str, Any],
                num_excluded: int | None = None) -> bool:
        """Publish a part; return False if another job published the same name first.

        Args:
            name: name of the part.
            version: version of added columns; "": rows.
            table: the rows.
            provenance: description of the writing program, as JSON values.
            num_excluded: number of rows with a problem.

        Raises:
            UserError: too many rows, or the disk is not writable; no files remain.
        """
        # imports pyarrow, as above
        from megatron_sov.work.tables.parquet import find_table_problem, write_table

        path, kind = self.part_path(name, version), self.ADDED if version else self.ROWS
        if problem := find_table_problem(table):
            raise UserError(f"{path}: {problem}")
        # a unique temporary name: two writers on any machines only meet in the final rename
        temporary = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
        with translate_disk_errors(path):
            try:
                with create_artifact(temporary, kind) as artifact:
                    columns = set(table.column_names)
                    repeated = [leaf for leaf in self.REPEATED if leaf.split(".")[0] in columns]
                    split = [leaf for leaf in self.SPLIT if leaf.split(".")[0] in columns]
                    write_table(artifact.path / f"{kind}.parquet", table, repeated, split)
                    artifact.content = {
                        "num_rows": table.num_rows,
                        **({self.VERSION: version} if version else {EXCLUDED_FIELD: num_excluded or 0}),
                        "store": self.identity}
                    artifact.settings = dict(provenance)
                return rename_unless_taken(temporary, path)
            except UserError as e:  # replace the temporary name in the message
                raise UserError(str(e).replace(str(temporary), str(path))) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def clearable(self, versions: Collection[str] = (),
                  firsts: Collection[int] = ()) -> list[DeletableFolder]:
        """Return folders that may be deleted: leftovers of killed jobs, claims on finished work, selected
        parts.

        Args:
            versions: versions, or names of their folders, whose added columns to delete.
            firsts: first key numbers of parts to delete, together with added columns.
        """
        folders = {version[:VERSION_CHARS] for version in versions} & set(self.versions())
        clearables = []
        for path, why in self._iter_deletable(folders, firsts):
            size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            clearables.append(DeletableFolder(path, why, size_bytes))
        return clearables

    def _iter_deletable(self, folders: set[str], firsts: Collection[int]) -> Iterator[tuple[Path, str]]:
        """Yield (path, reason) to delete: versions in `folders`, parts whose first number is in `firsts`."""
        remaining_versions = ["", *(folder for folder in self.versions() if folder not in folders)]
        for folder in (self.path / self.ADDED, self.claims, *map(self._version_folder, remaining_versions)):
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") and _is_abandoned(path):
                    yield path, "a killed job left it"
        # claims on published parts are useless
        finished_claims = set()
        for version in remaining_versions:
            for path in sorted(self._version_folder(version).iterdir()):
                if (path / MANIFEST).is_file():
                    finished_claims.add(self.claim_name(path.name, version))
                key = self.key_of(path.name)
                if key is not None and key[0] in firsts:
                    yield path, f"of {self.FIRST} {key[0]}"
        for version in folders:
            finished_claims |= {self.claim_name(path.name, version)
                                for path in self._version_folder(version).iterdir()}
            yield self._version_folder(version), "of that version"
        yield from ((path, "what it claims is done") for path in sorted(self.claims.iterdir())
                    if path.name in finished_claims)


def delete_folders(found: Collection[DeletableFolder]) -> None:
    """Delete folders, renaming each to a hidden name first. Raises `UserError`: no permission."""
    for item in found:
        hidden = item.path.with_name(f".{item.path.name}.gone-{uuid.uuid4().hex}")
        # suppressed: another process has deleted it
        with translate_disk_errors(item.path), contextlib.suppress(FileNotFoundError):
            delete_folder(item.path, hidden)


def _is_abandoned(folder: Path) -> bool:
    """Return whether a temporary folder seems abandoned: unlocked, and unchanged for `LEFTOVER_S`.

    File systems without locks leave only the time of the last change.
    """
    if is_locked(folder):
        return False
    try:
        newest_s = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # being renamed or deleted
        return False
    return ".gone-" in folder.name or time.time() - newest_s > LEFTOVER_S
