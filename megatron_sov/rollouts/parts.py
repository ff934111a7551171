"""A part of the store: what one job has published of one piece, a Parquet file with a manifest.  It appears
whole, by a rename, and never changes."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.artifacts import (
    MANIFEST,
    Manifest,
    disk_errors,
    file_damage,
    manifest_sha256,
    new_artifact,
    read_manifest,
    rename_unless_taken,
)
from megatron_sov.errors import UserError

if TYPE_CHECKING:  # pyarrow takes long to import, and names of parts are wanted without it
    import pyarrow as pa

ROLLOUTS, REWARDS = "rollouts", "rewards"
"""Kinds of parts: of the manifests, and in the names of folders and files."""
_NAME = re.compile(r"round-([1-9]\d{4,}|\d{4})-piece-([1-9]\d{4,}|\d{4})(?:-attempt-([1-9]\d*))?")


class AlreadyPublished(UserError):
    """A part of this name was published first, with other rows: they stay, and the work on it is done."""


@dataclass(frozen=True)
class Part:
    """One part, as its manifest tells it."""

    name: str
    """See `part_name`."""
    path: Path
    """Its folder."""
    kind: str
    """`ROLLOUTS` or `REWARDS`."""
    round: int
    """From 1."""
    piece: int
    """From 0."""
    attempt: int
    """0, or which continuation of the piece's unfinished rows it is."""
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
    reward_version: str = ""
    """Of rewards."""

    @property
    def file(self) -> Path:
        """Return its Parquet file."""
        return self.path / f"{self.kind}.parquet"


def part_name(round: int, piece: int, attempt: int = 0) -> str:
    """Return the name of a piece's part: of a round from 1, a piece from 0, and an attempt from 0."""
    return f"round-{round:04d}-piece-{piece:04d}" + (f"-attempt-{attempt}" if attempt else "")


def numbers_in(name: str) -> tuple[int, int, int] | None:
    """Return the round, piece and attempt of a part's name; None where it is the name of none."""
    found = _NAME.fullmatch(name)
    return None if found is None or not int(found[1]) else (int(found[1]), int(found[2]), int(found[3] or 0))


def open_part(path: Path, kind: str, store: Mapping[str, Any]) -> Part:
    """Return a part by its folder; its rows are not looked at.

    Args:
        path: the folder.
        kind: what it must be.
        store: the identity of the store that it must belong to.

    Raises:
        UserError: it is no such part, is torn, or belongs to another store.
    """
    numbers = numbers_in(path.name)
    if numbers is None:
        raise UserError(f"{path}: is no part of the store, whose names are as {part_name(1, 0)}; move it "
                        "away")
    manifest = read_manifest(path, kind)
    problem = _problem(path, manifest, store)
    if problem:
        raise UserError(f"{path}: {problem}; restore it from a copy, or delete it to have it made again")
    content = manifest.content
    return Part(path.name, path, kind, *numbers, content["num_rows"], content.get("num_kept_out", 0),
                manifest_sha256(path), manifest.created_s, manifest.settings,
                content.get("reward_version", ""))


def _problem(path: Path, manifest: Manifest, store: Mapping[str, Any]) -> str:
    """Return what is wrong with a part as far as its manifest and the sizes of its files tell."""
    content, name = manifest.content, f"{manifest.kind}.parquet"
    if content.get("store") != store:
        return f"belongs to another store ({_told(content.get('store'))}; this one: {_told(store)})"
    if list(manifest.files) != [name]:
        return f"has the files {', '.join(manifest.files) or 'none'}, must have {name} alone"
    counts = [content.get("num_rows"), content.get("num_kept_out", 0)]
    if not all(type(count) is int and count >= 0 for count in counts):
        return f"{MANIFEST} has num_rows = {counts[0]!r} and num_kept_out = {counts[1]!r}"
    if not isinstance(content.get("reward_version", ""), str):
        return f"{MANIFEST} has no text as reward_version"
    file = path / name
    size_bytes = file.stat().st_size if file.is_file() else 0
    wanted = manifest.files[name].size_bytes
    return f"{name} has {size_bytes:,} bytes, must have {wanted:,}" if size_bytes != wanted else ""


def _told(store: Any) -> str:
    return (f"tokenizer {str(store.get('tokenizer'))[:24]}, {store.get('vocab_size')} ids"
            if isinstance(store, Mapping) else "of none")


def read_part(part: Part, schema: pa.Schema) -> pa.Table:
    """Return columns of a part's rows, whose bytes are checked against its manifest first.

    Raises:
        UserError: the file is damaged, too large, or none that the store wrote.
    """
    from megatron_sov.rollouts.parquet import read_table

    record = read_manifest(part.path).files[part.file.name]
    if damage := file_damage(part.file, record):
        raise UserError(f"{damage}; restore it from a copy, or delete {part.path} to have it made again")
    table = read_table(part.file, schema)
    if table.num_rows != part.num_rows:
        raise UserError(f"{part.file}: has {table.num_rows:,} rows, its manifest says {part.num_rows:,}")
    return table


def write_part(path: Path, kind: str, table: pa.Table, content: Mapping[str, Any],
               provenance: Mapping[str, Any]) -> bool:
    """Publish a part; returns whether it is there by this call, False where one of that name was first.

    Args:
        path: its folder.
        kind: of the part.
        table: its rows.
        content: what its manifest tells beside their number.
        provenance: what wrote it.

    Raises:
        UserError: the rows are too many, or the disk refuses; nothing is left of it.
    """
    from megatron_sov.rollouts.parquet import table_problem, write_table
    from megatron_sov.rollouts.tables import REPEATED, SPLIT

    if problem := table_problem(table):
        raise UserError(f"{path}: {problem}")
    # a name of its own: two writers, on whatever machines, meet in the last rename alone
    built = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
    with disk_errors(path):
        try:
            with new_artifact(built, kind) as artifact:
                leaves = {name.split(".")[0]: name for name in (*REPEATED, *SPLIT)}
                here = [leaf for name, leaf in leaves.items() if name in table.column_names]
                write_table(artifact.path / f"{kind}.parquet", table,
                            [leaf for leaf in here if leaf in REPEATED], [x for x in here if x in SPLIT])
                artifact.content = {"num_rows": table.num_rows, **content}
                artifact.settings = dict(provenance)
            return rename_unless_taken(built, path)
        except UserError as e:  # the name that it was built under means nothing to anyone
            raise UserError(str(e).replace(str(built), str(path))) from None
        finally:
            shutil.rmtree(built, ignore_errors=True)
