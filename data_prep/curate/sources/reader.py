"""Base class for readers: list a source's files, and read files in a separate process with limits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from data_prep.curate.sources.encodings import EncodingLimits
from data_prep.curate.sources.source import (
    MAX_CONTENT_CHARS, NO_FORMAT, BrokenRecord, RawDocument, SourcePiece, SourceSettings)
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import (
    COMPRESSED_SUFFIXES, explain_unreadable, format_skipped, is_hidden, walk_files)
from megatron_sov.base.documents.records import count_text_bytes
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import parse_settings
from megatron_sov.sandbox.reader_process import ReaderProcess, ReaderWording
from megatron_sov.work.processes.channel import receive_message, send_message

EMPTY = "empty"
"""Code for a record without text, which is left out."""
WORDING = ReaderWording("parser", "read", "time_s")
_MESSAGE_FACTOR = 8
"""Maximum JSON bytes for each byte of text; a control character takes six."""


class FileReader:
    """Base class of readers; subclasses implement `iter_documents`, or `iter_items` for files with parts."""

    format: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the reader gives a different text for the same file: runs parse files again."""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    """Endings of files to read in folders, in lower case."""
    compressed: ClassVar[bool] = True
    """Whether files may also end in `.gz` and `.zst`."""
    Options: ClassVar[type[Any]] = EncodingLimits
    """Frozen dataclass with the format's options."""

    def __init__(self, source: SourceSettings) -> None:
        self.source = source
        # Without options nothing is parsed, so that reading processes start without pydantic.
        options = source.options
        self.options: Any = parse_settings(self.Options, options, "options") if options else self.Options()
        self.notes: list[str] = []
        """Sentences about files that `list_pieces` skipped."""

    @classmethod
    def accepts_name(cls, name: str) -> bool:
        stem, dot, suffix = name.lower().rpartition(".")
        if cls.compressed and f".{suffix}" in COMPRESSED_SUFFIXES and stem:
            stem, dot, suffix = stem.rpartition(".")
        return bool(stem) and dot + suffix in cls.suffixes

    def list_pieces(self) -> list[SourcePiece]:
        """List the source's parts in a fixed order; raise `UserError` for an empty source."""
        left_out: list[SourcePiece] = []
        names = list_source_files(self.source, self.accepts_name, left_out, self.notes)
        return [piece for name in names for piece in self.split_file(name)] + left_out

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Yield a file's pieces; by default the whole file."""
        size_bytes = self.source.get_file(name).stat().st_size
        yield SourcePiece(self.format, name, 0, size_bytes, size_bytes)

    def read_piece(self, piece: SourcePiece) -> Iterator[RawDocument | BrokenRecord]:
        """Yield records from a process with limits, or the reason why a file has no format."""
        if piece.format == NO_FORMAT:
            name, reason = format_file_name(piece.file), explain_unreadable(self.source.get_file(piece.file))
            yield BrokenRecord(name, name, "left_out", reason, is_left_out=True)
            return
        yield from read_in_process(ReadingJob(piece, self.source.root, self.source.text_field, self.options))

    @classmethod
    def iter_items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        """Yield a piece's parts. Called in the reading process; a second call must give equal parts."""
        yield SourceItem(job.name, lambda: cls.iter_documents(job))

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        raise NotImplementedError(cls.__name__)


# Listing files.


def list_source_files(source: SourceSettings, accepts_name: Callable[[str], bool],
                      left_out: list[SourcePiece] | None = None, notes: list[str] | None = None) -> list[str]:
    """List a source's file names, sorted by folders, without repetitions.

    A file in `source.path` is read under any name; from folders only accepted names are read.

    Args:
        source: the source.
        accepts_name: whether to read a file with this name.
        left_out: receives a `NO_FORMAT` piece for each unreadable path that is not hidden.
        notes: receives a sentence about skipped files for each folder.

    Raises:
        UserError: a path does not exist, a folder cannot be listed, or no file is left.
    """
    root = source.root
    names: set[str] = set()
    unreadable: list[Path] = []
    for path in source.path:
        # Not `resolve`: a link is read under the name in the settings.
        start = Path(os.path.abspath(source.folder / path))
        if start.is_dir():
            skipped: list[Path] = []
            files = list(map(Path, walk_files(start, skipped)))
            names.update(_to_name(file, root) for file in files if accepts_name(file.name))
            unreadable += [other for other in skipped if not is_hidden(other.name)]
            sentence = format_skipped([_to_name(file, root) for file in files if not accepts_name(file.name)],
                                      [_to_name(other, root) for other in skipped if is_hidden(other.name)])
            if sentence and notes is not None:
                notes.append(escape_controls(f"{path}: {sentence}"))
        elif start.is_file():
            names.add(_to_name(start, root))
        else:
            raise UserError(f"source {source.name}: {start}: is no file and no folder; name one that "
                            "is there")
    if not names:
        raise_no_files(source)
    if left_out is not None:
        left_out += [SourcePiece(NO_FORMAT, _to_name(path, root), 0, 0, 0) for path in sorted(set(unreadable))
                     if path.is_dir() or accepts_name(path.name)]
    # Sorted by folders, so that the order does not depend on characters before "/" in ASCII.
    return sorted(names, key=lambda name: name.split("/"))


def raise_no_files(source: SourceSettings) -> NoReturn:
    raise UserError(f"source {source.name}: {', '.join(source.path)}: holds no file that format = "
                    f"{source.format!r} reads; name another folder or format")


def _to_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def format_file_name(name: str) -> str:
    r"""Escape bytes that are not UTF-8 (``\xff``), control characters, and ``\`` (doubled), so that
    different names stay different."""
    # Backslashes first: afterwards escapes are unambiguous.
    escaped = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return escape_controls(escaped).replace("\n", r"\n").replace("\t", r"\t")


# The piece of a source in the reading process.


@dataclass(frozen=True)
class ReadingJob:
    """A piece with the settings for the reading process."""

    piece: SourcePiece
    root: Path
    """Folder for the piece's file names."""
    text_field: str
    """As `SourceSettings.text_field`."""
    options: Any
    """Instance of the format's `Options`."""

    @property
    def file(self) -> Path:
        return self.root / self.piece.file

    @property
    def name(self) -> str:
        return format_file_name(self.piece.file)

    def build_broken(self, error: BadRecord, place: str = "", is_left_out: bool = False) -> BrokenRecord:
        content = error.content.decode("utf-8", "replace")[:MAX_CONTENT_CHARS]
        return BrokenRecord(self.name, place or self.name, error.code, str(error), content, is_left_out)

    def to_message(self) -> dict[str, Any]:
        return {"piece": dataclasses.asdict(self.piece), "root": str(self.root),
                "text_field": self.text_field, "options": dataclasses.asdict(self.options)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any], options: type[Any]) -> ReadingJob:
        """Invert `to_message`, with the class of the format's options."""
        return cls(SourcePiece(**_convert_lists(message["piece"])), Path(message["root"]),
                   message["text_field"], options(**_convert_lists(message["options"])))


def _convert_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@dataclass(frozen=True)
class SourceItem:
    """A part with a separate time limit."""

    place: str
    read: Callable[[], Iterator[RawDocument | BrokenRecord]]
    """May raise `BadRecord`, or any error from a parser."""


def check_text(text: str, document_bytes: int) -> None:
    """Raise `BadRecord` if a text is too long or blank, or holds a lone surrogate."""
    if count_text_bytes(text) > document_bytes:
        raise BadRecord("too_long", f"holds more than document_bytes = {document_bytes:,} bytes of text; cut "
                                    "it, or raise the limit")
    if not text.strip():
        raise BadRecord(EMPTY, "holds no text")


def drop_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "", [], {})}


# The reading process has limits: a file that hangs, exhausts memory or crashes its parser loses only that
# document. It serves further files until it ends. It sends JSON, so no file can make this process run or
# unpickle anything.


def read_in_process(job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
    """Yield the records in a piece. If a limit ends the process, yield a `BrokenRecord` and continue with the
    next item in another process."""
    skip = 0
    while True:
        process = _get_process(str(job.root), job.options)
        progress = _Progress()
        is_finished = False
        try:
            yield from process.read(job, skip, progress)
            is_finished = True
            return
        except BadRecord as e:
            yield job.build_broken(e, progress.place)
            # Ended before the first item: another process would end there too.
            if progress.number is None:
                return
            skip = progress.number + 1
        finally:
            if not is_finished:  # the process ended, or the caller closed this generator
                process.end()
                if _processes.get(os.getpid()) is process:
                    del _processes[os.getpid()]


class _Progress:
    """A process's current item."""

    number: int | None = None
    place = ""


class _ReadingProcess(ReaderProcess):
    def __init__(self, root: str, limits: EncodingLimits) -> None:
        super().__init__("data_prep.curate.sources.enclosed", root, {"memory_bytes": limits.memory_bytes},
                         limits.time_s, WORDING)
        self._root, self._limits = root, limits

    def can_read(self, root: str, limits: EncodingLimits) -> bool:
        # The kernel has the limits from the start and does not raise them.
        has_limits = (self._limits.memory_bytes, self._limits.time_s) == (limits.memory_bytes, limits.time_s)
        return has_limits and Path(root).is_relative_to(self._root)

    def read(self, job: ReadingJob, skip: int, progress: _Progress) -> Iterator[RawDocument | BrokenRecord]:
        """Yield the records in a piece after the first `skip` items. Raises `BadRecord`: the process ended,
        or sent an invalid message."""
        limits: EncodingLimits = job.options
        # A hostile file may control the sender, so every message is checked, first its size.
        max_bytes = _MESSAGE_FACTOR * limits.document_bytes + (1 << 20)
        with self.open_exchange() as channel:
            send_message(channel, {"job": job.to_message(), "skip": skip})
            while True:
                self.reset_timeout()
                message = receive_message(channel, max_bytes)
                if "end" in message:
                    return
                if "at" in message:
                    progress.number, progress.place = int(message["at"]), str(message["place"])
                elif "error" in message:
                    raise BadRecord(str(message["error"]), str(message["reason"]))
                else:
                    yield _parse_record(message, limits)


def _parse_record(message: dict[str, Any], limits: EncodingLimits) -> RawDocument | BrokenRecord:
    """Raise `KeyError`, `TypeError`, `ValueError` or `BadRecord` for an invalid message."""
    if "broken" in message:
        values = message["broken"]
        return BrokenRecord(str(values["file"]), str(values["place"]), code=str(values["code"]),
                            reason=str(values["reason"]), content=str(values["content"])[:MAX_CONTENT_CHARS],
                            is_left_out=values["is_left_out"] is True)
    text, place, columns = message["text"], message["place"], message["columns"]
    if not (isinstance(text, str) and isinstance(place, str) and isinstance(columns, dict)):
        raise TypeError("a document without text, place or columns")
    if count_text_bytes(text) > limits.document_bytes:
        raise ValueError("a document above the limit")
    return RawDocument(text, place, columns)


_processes: dict[int, _ReadingProcess] = {}
"""Process id -> reading process; a fork finds no entry for its own id."""


def _get_process(root: str, limits: EncodingLimits) -> _ReadingProcess:
    process = _processes.get(os.getpid())
    if process is not None and process.can_read(root, limits) and not process.needs_replacement:
        return process
    if process is not None:
        process.end()
    _processes.clear()
    _processes[os.getpid()] = _ReadingProcess(root, limits)
    return _processes[os.getpid()]
