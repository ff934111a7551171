"""Which files are read, and in which parts: spans that several processes can read on their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov import sealed
from megatron_sov.documents.cutting import cut_position
from megatron_sov.documents.records import BadRecord
from megatron_sov.documents.synthesis import KEPT, is_synthesis
from megatron_sov.errors import UserError

WHOLE_FILE_BYTES = 1_000_000
DOCUMENT_BYTES = 200_000
JSONL_SUFFIXES = frozenset([".jsonl", ".ndjson"])
TEXT_SUFFIXES = JSONL_SUFFIXES | frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".py", ".pyi", ".c", ".h", ".cc",
    ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".js", ".jsx", ".ts",
    ".tsx", ".mjs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".swift", ".cs", ".sh", ".bash",
    ".sql", ".cmake", ".html", ".htm", ".css", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv",
    ".tsv", ".log", ".srt",
])
"""Endings of the files that are read from a folder; a file that is named itself is read
whatever its ending."""
PARQUET_SUFFIX = ".parquet"
VERSION_CONTROL = frozenset(["CVS", "__MACOSX"])
"""Folders that hold no files of the user's, beside those with a leading dot."""
COMPRESSED_SUFFIXES = frozenset([".gz", ".zst"])
SPAN_BYTES = 8 << 20
"""Part of a large file that is read on its own; text files are cut into documents anew in each."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """A part of a file that holds whole documents."""

    file: Path
    """The file."""
    start: int
    """First byte; of a Parquet file the first row group."""
    stop: int
    """Byte, or row group, behind the last."""
    document_bytes: int
    """Longest document of a text file."""
    size_bytes: int
    """Bytes on the disk."""

    @property
    def compression(self) -> str:
        """Return ".gz", ".zst" or an empty string."""
        suffix = self.file.suffix.lower()
        return suffix if suffix in COMPRESSED_SUFFIXES else ""

    @property
    def suffix(self) -> str:
        """Return the ending that says what the file holds, without that of a compression."""
        return (Path(self.file.stem) if self.compression else self.file).suffix.lower()


def list_files(path: Path) -> list[Path]:
    """Return the files to read at `path`: the file itself, or a folder's text files, recursive and sorted.

    Those of `walk_files` whose ending is in `TEXT_SUFFIXES`; what that leaves out is told.

    Raises:
        UserError: the path does not exist, or the folder holds no text file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; pass a text file, a .jsonl file or a folder of them")
    left_out: list[Path] = []
    found = [Path(file) for file in walk_files(path, left_out) if _is_read(Path(file))]
    if left_out := [one for one in left_out if one.is_dir() or _is_read(one)]:
        print(f"{path}: {len(left_out):,} left out; the first: {left_out[0]} {why_left_out(left_out[0])}",
              file=sys.stderr)
    if not found:
        raise UserError(f"{path}: holds no text file (endings such as .txt, .md, .py, .jsonl, .jsonl.gz, "
                        ".parquet are read); pass a folder with text")
    return sorted(found, key=lambda p: p.relative_to(path).parts)


def walk_files(folder: Path, left_out: list[Path]) -> Iterator[str]:
    """Yield the ordinary files below a folder, and those that links lead to, wherever they lie.

    Hidden files and folders, and those of version control, are passed over; of a folder of `sov-data synth`
    the samples that were kept are read, and nothing else.  A folder is walked once, links to folders last, so
    that no circle of links is without end.

    Args:
        folder: the folder.
        left_out: receives what a name stands for and cannot be read; `why_left_out` says why.

    Raises:
        UserError: a folder cannot be listed.
    """
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

    seen: set[str] = set()
    root = os.path.realpath(folder)
    waiting = [os.fspath(folder)]
    while waiting:
        links: list[str] = []
        for top in waiting:
            for where, folders, files in os.walk(top, onerror=refuse):
                real = os.path.realpath(where)
                if real in seen or root.startswith(f"{real.rstrip('/')}/"):
                    left_out.append(Path(where))
                    folders[:] = []
                    continue
                seen.add(real)
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in VERSION_CONTROL)
                if is_synthesis(files):
                    folders[:], files = [], [KEPT]
                links += [path for f in folders if os.path.islink(path := os.path.join(where, f))]
                for path in (os.path.join(where, file) for file in sorted(files) if not file.startswith(".")):
                    if os.path.isfile(path):
                        yield path
                    else:
                        left_out.append(Path(path))
        waiting = links


def why_left_out(path: Path) -> str:
    """Return why `walk_files` leaves something out."""
    if path.is_dir():
        return "leads to a folder that is read under another name, or that holds this one"
    return "is a link that leads to nothing" if not path.exists() else "is no ordinary file"


def _is_read(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix in COMPRESSED_SUFFIXES:
        suffix = Path(file.stem).suffix.lower()
    return suffix in TEXT_SUFFIXES or suffix == PARQUET_SUFFIX


def plan_units(files: Iterable[Path], unit_bytes: int = SPAN_BYTES) -> Iterator[tuple[Span, ...]]:
    """Yield units of work of about `unit_bytes` on the disk: several small files, or a part of a large one.

    A compressed file is one span whatever its size, since it can only be read from its start.
    """
    group: list[Span] = []
    size_bytes = 0
    for file in files:
        for span in spans_of(file, unit_bytes):
            if group and size_bytes + span.size_bytes > unit_bytes:
                yield tuple(group)
                group, size_bytes = [], 0
            group.append(span)
            size_bytes += span.size_bytes
    if group:
        yield tuple(group)


def spans_of(file: Path, span_bytes: int = SPAN_BYTES, *, read_as: str = "") -> Iterator[Span]:
    """Yield the spans of one file, of about `span_bytes` each; joined they are the file.

    Args:
        file: the file.
        span_bytes: see above.
        read_as: ending that says what it holds, as ".jsonl"; "": its own does.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        size_bytes = file.stat().st_size
        whole = Span(file, 0, size_bytes,
                     max(size_bytes, 1) if size_bytes <= WHOLE_FILE_BYTES else DOCUMENT_BYTES, size_bytes)
        suffix = read_as or whole.suffix
        if suffix == PARQUET_SUFFIX:
            yield from _row_groups(whole, span_bytes)
        elif whole.compression or size_bytes <= max(span_bytes, WHOLE_FILE_BYTES):
            yield whole
        else:
            starts = list(_starts(whole, span_bytes, suffix))
            for start, stop in zip(starts, [*starts[1:], size_bytes], strict=True):
                yield Span(file, start, stop, whole.document_bytes, stop - start)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); "
                        "check the path and its permissions") from e


def _starts(whole: Span, span_bytes: int, suffix: str) -> Iterator[int]:
    """Yield where spans of a large file begin: at a line of JSONL, behind a blank line of text."""
    start = 0
    with open(whole.file, "rb") as f:
        while start < whole.stop:
            yield start
            start += span_bytes
            f.seek(start)
            if suffix in JSONL_SUFFIXES:
                while (block := f.readline(_BLOCK_BYTES)) and not block.endswith(b"\n"):
                    start += len(block)
                start += len(block)
            elif len(window := f.read(DOCUMENT_BYTES + 1)) > DOCUMENT_BYTES:
                start += cut_position(window, 0, DOCUMENT_BYTES)
            else:
                return


def _row_groups(whole: Span, span_bytes: int) -> Iterator[Span]:
    """Yield runs of row groups; a file that is no Parquet is one span, and found out where it is read."""
    try:
        metadata = open_parquet(whole.file).metadata
    except BadRecord:
        yield whole
        return
    first, size_bytes = 0, 0
    for i in range(metadata.num_row_groups):
        size_bytes += metadata.row_group(i).total_byte_size
        if size_bytes >= span_bytes or i == metadata.num_row_groups - 1:
            yield Span(whole.file, first, i + 1, whole.document_bytes, size_bytes)
            first, size_bytes = i + 1, 0


def open_parquet(file: Path) -> Any:
    """Return a Parquet file opened by pyarrow; a string that many rows of a page share is held in memory
    once, as it is in the file.

    Raises:
        BadRecord: it is not one, or only a part of one.
    """
    import pyarrow

    try:
        opened = sealed.open_parquet(file)
        leaves = [opened.schema.column(i) for i in range(len(opened.schema))]
        strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"
                   and leaf.logical_type.type in ("STRING", "NONE")]
        return sealed.open_parquet(file, metadata=opened.metadata, read_dictionary=strings)
    except UserError as e:
        raise BadRecord("parquet", str(e).removeprefix(f"{file}: ")) from None
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as e:
        reason = str(e).splitlines()[0]
        raise BadRecord("parquet",
                        f"is not a Parquet file, or only a part of one ({reason}); fetch it again") from None
