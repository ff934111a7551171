"""What all readers of files share: which files a source has, and reading each in a process with limits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from data_prep.curate.sources.encodings import COMPRESSED, EncodingLimits
from data_prep.curate.sources.source import (
    MAX_CONTENT_CHARS, NO_FORMAT, BrokenRecord, RawDocument, SourcePiece, SourceSettings)
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import explain_unreadable, format_skipped, is_hidden, walk_files
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import parse_settings
from megatron_sov.sandbox.readers import KeptReader, Wording
from megatron_sov.work.processes.channel import receive_message, send_message


def list_source_files(source: SourceSettings, wanted: Callable[[str], bool],
                 left_out: list[SourcePiece] | None = None,
                 tell: Callable[[str], object] = lambda sentence: None) -> list[str]:
    """Return the names of a source's files, sorted, each once.

    A file that the settings name is read whatever it is called.  Of a folder those that are `wanted` (by
    name) are, as `walk_files` finds them.

    Args:
        source: the source.
        wanted: tells by its name whether a file is.
        left_out: receives a piece for everything that the walk leaves out and that is not hidden, sorted; it
            holds nothing to read.
        tell: is given a sentence on what is hidden or not wanted in each folder.

    Raises:
        UserError: a folder cannot be listed, or there is no such file.
    """
    root = source.root
    names: set[str] = set()
    without: list[Path] = []
    for path in source.path:
        # Not `resolve`: a link that the user names is read under the user's name.
        given = Path(os.path.abspath(source.folder / path))
        if given.is_dir():
            found: list[Path] = []
            walked = list(map(Path, walk_files(given, found)))
            names.update(_name(file, root) for file in walked if wanted(file.name))
            without += [one for one in found if not is_hidden(one.name)]
            if sentence := format_skipped([_name(file, root) for file in walked if not wanted(file.name)],
                                          [_name(one, root) for one in found if is_hidden(one.name)]):
                tell(escape_controls(f"{path}: {sentence}"))
        elif given.is_file():
            names.add(_name(given, root))
        else:
            raise UserError(f"source {source.name}: {given}: is no file and no folder; name one that "
                            "is there")
    if not names:
        raise_no_files(source)
    if left_out is not None:
        left_out += [SourcePiece(NO_FORMAT, _name(path, root), 0, 0, 0) for path in sorted(set(without))
                     if path.is_dir() or wanted(path.name)]
    # By folders: the order of a walk does not depend on the signs in names.
    return sorted(names, key=lambda name: name.split("/"))


def raise_no_files(source: SourceSettings) -> NoReturn:
    raise UserError(f"source {source.name}: {', '.join(source.path)}: holds no file that format = "
                    f"{source.format!r} reads; name another folder or format")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def format_file_name(name: str) -> str:
    r"""Return a file's name as text: bytes of it that are no UTF-8, and control characters, are written as
    escapes such as ``\xff``, and a ``\`` of its own as two, so that no two names look the same."""
    # A name's own backslash first: only then are escapes plain.
    escaped = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return escape_controls(escaped).replace("\n", r"\n").replace("\t", r"\t")


# A piece of a source as the process that reads it gets it, and what it is cut into there.

EMPTY = "empty"
"""Code of what a record without text, which is left out."""


@dataclass(frozen=True)
class ReadingJob:
    """One piece as the reading process gets it."""

    piece: SourcePiece
    """Which."""
    root: Path
    """Folder that names are relative to."""
    text_field: str
    """As `SourceSettings.text_field`."""
    options: Any
    """The format's, as its own class."""

    @property
    def file(self) -> Path:
        return self.root / self.piece.file

    @property
    def name(self) -> str:
        return format_file_name(self.piece.file)

    def broken(self, error: BadRecord, place: str = "", is_left_out: bool = False) -> BrokenRecord:
        content = error.content.decode("utf-8", "replace")[:MAX_CONTENT_CHARS]
        return BrokenRecord(self.name, place or self.name, error.code, str(error), content, is_left_out)


@dataclass(frozen=True)
class SourceItem:
    """A part of a piece for which reading it has a time limit of its own."""

    place: str
    """Where it stands."""
    read: Callable[[], Iterator[RawDocument | BrokenRecord]]
    """Reads it; may raise `BadRecord`, or anything that a parser raises on what it does not understand."""


def drop_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "", [], {})}


def format_job_message(job: ReadingJob) -> dict[str, Any]:
    return {"piece": dataclasses.asdict(job.piece), "root": str(job.root), "text_field": job.text_field,
            "options": dataclasses.asdict(job.options)}


def parse_job_message(message: Mapping[str, Any], options: type[Any]) -> ReadingJob:
    """Return the job of a message; `options`: the class of its format's options."""
    return ReadingJob(SourcePiece(**_with_tuples(message["piece"])), Path(message["root"]),
                      message["text_field"], options(**_with_tuples(message["options"])))


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# Reading files of others in a process of its own, with limits: one that hangs, eats memory or crashes its
# parser costs the document and nothing else.
#
# The process is kept for the next file, and replaced where it was ended. What it sends is JSON: nothing that
# a file could make of it is ever run or unpickled here.

WORDING = Wording("parser", "read", "time_s")
_MESSAGE_FACTOR = 8
"""Bytes of JSON for a byte of text: a control character becomes six."""


def read_in_process(job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
    """Yield what a piece holds, in order.

    Where the process is ended for taking too much, that document is told as `Broken` and reading goes on
    behind it.
    """
    skip = 0
    while True:
        # A fresh process goes on behind the item that ended the last one.
        process = _process(str(job.root), job.options)
        last = _Last()
        finished = False
        try:
            yield from process.read(job, skip, last)
            finished = True
            return
        except BadRecord as e:
            yield job.broken(e, last.place)
            if last.number is None:  # it ended between two of them, and would again
                return
            skip = last.number + 1
        finally:
            if not finished:  # ended, or nobody wants the rest
                _forget(process)


class _Last:
    """How far a process has come."""

    number: int | None = None
    place = ""


class _Process(KeptReader):
    """One reading process."""

    def __init__(self, root: str, limits: EncodingLimits) -> None:
        super().__init__("data_prep.curate.sources.enclosed", root, {"memory_bytes": limits.memory_bytes},
                         limits.time_s, WORDING)
        self._root, self._limits = root, limits

    def serves(self, root: str, limits: EncodingLimits) -> bool:
        # Limits were given to the kernel at the start and cannot be raised.
        return (self._limits.memory_bytes, self._limits.time_s) == (limits.memory_bytes, limits.time_s) \
            and Path(root).is_relative_to(self._root)

    def read(self, job: ReadingJob, skip: int, last: _Last) -> Iterator[RawDocument | BrokenRecord]:
        """Yield what a piece holds behind its first `skip` items.

        Raises:
            BadRecord: the process was ended, or sends what it should not.
        """
        limits: EncodingLimits = job.options
        # The sender may have been taken over by a hostile file: nothing that it sends is believed, its size
        # least.
        most_bytes = _MESSAGE_FACTOR * limits.document_bytes + (1 << 20)
        with self.asking() as channel:
            send_message(channel, {"job": format_job_message(job), "skip": skip})
            while True:
                self.wait_again()
                message = receive_message(channel, most_bytes)
                if "end" in message:
                    return
                if "at" in message:
                    last.number, last.place = int(message["at"]), str(message["place"])
                elif "error" in message:
                    raise BadRecord(str(message["error"]), str(message["reason"]))
                else:
                    yield _told(message, limits)


def _told(message: dict[str, Any], limits: EncodingLimits) -> RawDocument | BrokenRecord:
    """Return what a message says.

    Raises:
        KeyError, TypeError, ValueError: it says nothing.
    """
    if "broken" in message:
        told = message["broken"]
        return BrokenRecord(str(told["file"]), str(told["place"]), str(told["code"]), str(told["reason"]),
                      str(told["content"])[:MAX_CONTENT_CHARS], told["is_left_out"] is True)
    text, place, columns = message["text"], message["place"], message["columns"]
    if not (isinstance(text, str) and isinstance(place, str) and isinstance(columns, dict)):
        raise TypeError("a document without text, place or columns")
    if len(text.encode()) > limits.document_bytes:
        raise ValueError("a document above the limit")
    return RawDocument(text, place, columns)


_kept: dict[int, _Process] = {}
"""This process's reading process, by its own number: a fork has none yet."""


def _process(root: str, limits: EncodingLimits) -> _Process:
    known = _kept.get(os.getpid())
    if known is not None and known.serves(root, limits) and not known.is_worn:
        return known
    if known is not None:
        known.end()
    _kept.clear()
    _kept[os.getpid()] = _Process(root, limits)
    return _kept[os.getpid()]


def _forget(process: _Process) -> None:
    process.end()
    if _kept.get(os.getpid()) is process:
        del _kept[os.getpid()]


class FileReader:
    """A reader of files; a format says which, and what is in one of them."""

    format: ClassVar[str]
    """Its name."""
    version: ClassVar[int] = 1
    """Raised where it gives another text of the same file: what an earlier one has parsed is parsed again."""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    """Endings of the files that are read from folders, with small letters."""
    compressed: ClassVar[bool] = True
    """Whether files may also end in `.gz` and `.zst`."""
    Options: ClassVar[type[Any]] = EncodingLimits
    """Frozen dataclass of its options, with `problems()`."""

    def __init__(self, source: SourceSettings) -> None:
        self.source = source
        # processes that only read start without pydantic
        given = source.options
        self.options: Any = parse_settings(self.Options, given, "options") if given else self.Options()
        self.notes: list[str] = []

    @classmethod
    def accepts_name(cls, name: str) -> bool:
        stem, dot, suffix = name.lower().rpartition(".")
        if cls.compressed and f".{suffix}" in COMPRESSED and stem:
            stem, dot, suffix = stem.rpartition(".")
        return bool(stem) and dot + suffix in cls.suffixes

    def list_pieces(self) -> list[SourcePiece]:
        left_out: list[SourcePiece] = []
        names = list_source_files(self.source, self.accepts_name, left_out, self.notes.append)
        return [piece for name in names for piece in self.split_file(name)] + left_out

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        size_bytes = self.source.get_file(name).stat().st_size
        yield SourcePiece(self.format, name, 0, size_bytes, size_bytes)

    def read_piece(self, piece: SourcePiece) -> Iterator[RawDocument | BrokenRecord]:
        """Yield what a piece holds, in order, read by a process with limits; of what is left out, why."""
        if piece.format == NO_FORMAT:
            name, reason = format_file_name(piece.file), explain_unreadable(self.source.get_file(piece.file))
            yield BrokenRecord(name, name, "left_out", reason, is_left_out=True)
            return
        job = ReadingJob(piece, self.source.root, self.source.text_field, self.options)
        yield from read_in_process(job)

    @classmethod
    def iter_items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        """Yield the parts of a piece; runs in the reading process.  The order, and how many there are, has
        to be the same each time."""
        yield SourceItem(job.name, lambda: cls.iter_documents(job))

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        """Yield what a piece holds that has no further parts."""
        raise NotImplementedError(cls.__name__)
