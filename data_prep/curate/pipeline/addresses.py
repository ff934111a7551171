"""Addresses: the hash of all that a folder's content follows from, so that a changed setting or input has a
folder of its own and what depends on it too, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.curate.pipeline.counts import StageProgress
from data_prep.curate.pipeline.pipeline_file import Pipeline
from data_prep.curate.sources.formats import reader
from data_prep.curate.sources.source import PASSED_OVER, SourcePiece
from megatron_sov.base.digests import BLAKE3, file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_size
from megatron_sov.base.sealed import try_read_json, write_json

FORMAT_VERSION = 5
"""Raised when the same inputs and settings would have other files."""
REASONS_FILE = "address.json"
HASH_THREADS = 4
_TICK_NS = 20_000_000
"""Two changes within it may have the same time."""
Mark = list[int]
"""Size, times of change of content and of status, and inode of a file."""


def address(ingredients: Mapping[str, Any]) -> str:
    """Return the address of what follows from plain values, in 12 hexadecimal digits."""
    written = json.dumps({"format": FORMAT_VERSION, **ingredients}, sort_keys=True, ensure_ascii=False)
    # names of files may hold bytes that are no text
    return hashlib.sha256(written.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def hashes_of(files: Sequence[Path], known: Path | None = None, *, keep: bool = True) -> dict[str, str]:
    """Return path -> content hash of files; as `entries_of`."""
    return {file: entry[-1] for file, entry in entries_of(files, known, keep=keep).items()}


def entries_of(files: Sequence[Path], known: Path | None = None, *, keep: bool = True
               ) -> dict[str, list[Any]]:
    """Return path -> [*mark, content hash] of files.

    Args:
        files: what to read.
        known: where hashes are kept from one command to the next; a file whose mark is the same is not read
            again: no program can set the time of its status back.  None: nothing is kept.
        keep: whether that file may be written.

    Raises:
        UserError: a file cannot be read, or is written to.
    """
    before = known_entries(known) if known is not None else {}

    def one(file: Path) -> list[Any]:
        mark = mark_of(file)
        # Size, times and inode are as they were: then the content is, and terabytes need not be read again.
        entry: list[Any] = before.get(str(file), [])
        return entry if is_known(entry, mark) else _read_entry(file, mark)

    found: dict[str, list[Any]] = {}
    with (ThreadPoolExecutor(HASH_THREADS) as pool,
          StageProgress("inputs", len(files), "files") as progress):
        for file, entry in zip(files, pool.map(one, files), strict=True):
            found[str(file)] = entry
            progress()
    if keep and known is not None:
        # Parts that jobs left are joined into one file before they go: a kill in between loses nothing.
        if found != before or parts_of(known).exists():
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, found)
        shutil.rmtree(parts_of(known), ignore_errors=True)
    return found


def known_entries(known: Path) -> dict[str, Any]:
    """Return path -> [*mark, content hash] as earlier commands, or jobs of this one,
    have found them; nothing where that cannot be read, since it is only a shortcut."""
    found: dict[str, Any] = {}
    for file in [known, *sorted(parts_of(known).glob("*.json"))]:
        found |= try_read_json(file) or {}
    return found


def parts_of(known: Path) -> Path:
    return known.parent / "parts" / known.stem


def unknown_files(files: Sequence[Path], known: Path) -> dict[Path, int]:
    """Return file -> size of those whose content is not known.

    Raises:
        UserError: a file cannot be looked at.
    """
    before = known_entries(known)
    marks = {file: mark_of(file) for file in files}
    return {file: mark[0] for file, mark in marks.items() if not is_known(before.get(str(file)), mark)}


def is_known(entry: Any, mark: Mark) -> bool:
    return isinstance(entry, list) and entry[:-1] == mark


def refuse_changed(file: Path, mark: Mark) -> None:
    if mark_of(file) != mark:
        raise UserError(f"{file}: has changed since the run looked at it; run the command again when nobody "
                        "writes to it")


def _read_entry(file: Path, mark: Mark) -> list[Any]:
    # a change within the same tick as the one before would leave no trace
    if 0 <= (age_ns := time.time_ns() - mark[2]) < _TICK_NS:
        time.sleep((_TICK_NS - age_ns) / 1e9)
        mark = mark_of(file)
    found = _content_hash(file)
    # A file that somebody writes to while it is read has no hash to go by.
    refuse_changed(file, mark)
    return [*mark, found]


def mark_of(file: Path) -> Mark:
    """Return what a change of a file's content shows in."""
    try:
        stat = os.stat(file)
    except OSError as e:
        raise _unreadable(file, e) from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _content_hash(file: Path) -> str:
    try:
        return file_digest(file, BLAKE3).partition(":")[2][:32]
    except OSError as e:
        raise _unreadable(file, e) from None


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read ({error.strerror or error}); check the path and its "
                     "permissions")


def tree_hash(path: Path) -> str:
    """Return the hash of a file's content, or of the names and contents in a folder.

    Raises:
        UserError: something cannot be read.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = hashes_of(files)
    return address({"files": [["" if file == path else file.relative_to(path).as_posix(), found[str(file)]]
                              for file in files]})


# Large sources are read by jobs of a cluster before anything is planned, and not by the machine where the
# command is typed.


READ_HERE_BYTES = 10 * 10**9
"""So much is read where the command is typed, in some seconds; of more a cluster's jobs read all."""
BATCH_BYTES, BATCH_FILES = 100 * 10**9, 10_000
"""What one job reads at most, in a few minutes."""


@dataclass(frozen=True)
class Batch:
    source: str
    files: tuple[str, ...]


def known_file(output: Path, source: str) -> Path:
    return output / "inputs" / f"{source}.json"


def input_names(pieces: Sequence[SourcePiece]) -> list[str]:
    return list(dict.fromkeys(name for piece in pieces if piece.format != PASSED_OVER
                              for name in (piece.file, *piece.beside)))


def unknown_inputs(pipeline: Pipeline, output: Path) -> dict[str, dict[Path, int]]:
    """Return source -> file -> size of the files whose contents are not known.

    Raises:
        UserError: a source holds nothing, or a file cannot be looked at.
    """
    return {source.name: unknown_files([source.file(name) for name in input_names(reader(source).pieces())],
                                       known_file(output, source.name)) for source in pipeline.sources}


def is_much(unknown: Mapping[str, Mapping[Path, int]]) -> bool:
    return sum(map(sum, (files.values() for files in unknown.values()))) > READ_HERE_BYTES


def describe_unknown(unknown: Mapping[str, Mapping[Path, int]]) -> str:
    return ", ".join(f"{format_size(sum(files.values()))} in {len(files):,} files of source {name}"
                     for name, files in unknown.items() if files)


def batches(unknown: Mapping[str, Mapping[Path, int]]) -> Iterator[Batch]:
    """Yield files in groups of at most `BATCH_BYTES` and `BATCH_FILES`, or of one file."""
    for source, files in unknown.items():
        group: list[str] = []
        size_bytes = 0
        for file, file_bytes in files.items():
            # Before the file is added, so that one larger than a batch has a batch of its own.
            if group and (size_bytes + file_bytes > BATCH_BYTES or len(group) >= BATCH_FILES):
                yield Batch(source, tuple(group))
                group, size_bytes = [], 0
            group.append(str(file))
            size_bytes += file_bytes
        if group:
            yield Batch(source, tuple(group))


def read_batch(batch: Batch, output: Path) -> None:
    """Read files, and leave what is known of them where the next plan finds it; what is there from an earlier
    try is not read again."""
    known = known_file(output, batch.source)
    # A name from the batch's files: the same batch, tried again, finds what it has read.
    part = parts_of(known) / f"{address({'files': batch.files})}.json"
    hashes_of([Path(file) for file in batch.files], part)
