"""Plain text and JSON lines, compressed or not."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from data_prep.curate.sources.encodings import (
    COMPRESSED, Encoding, EncodingLimits, LimitBytes, decode_text, iter_limited_blocks, open_unpacked)
from data_prep.curate.sources.reader import EMPTY, FileReader, ReadingJob, SourceItem, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourcePiece
from megatron_sov.base.documents import DOCUMENT_BYTES, WHOLE_FILE_BYTES, BadRecord, cut_at_blank_lines
from megatron_sov.base.documents.files import JSONL_SUFFIXES, iter_spans
from megatron_sov.base.documents.records import explain_bytes

# What a record of JSON lines or a table says, as a document.

COLUMN_NAMES = {"id": "own_id", "_id": "own_id", "url": "url", "uri": "url", "link": "url", "title": "title",
         "date": "date", "timestamp": "date", "created": "date", "licence": "licence", "license": "licence",
         "language": "language_hint", "lang": "language_hint"}
"""Field of a record -> the column that it becomes; others keep their names."""
MAX_FIELD_CHARS, MAX_FIELD_DEPTH = 4000, 20
"""Of what a record says beside its text; what is longer, or nested deeper, is left out."""


def build_document(record: Mapping[str, Any], place: str, job: ReadingJob) -> RawDocument:
    """Return the document of a record.

    Raises:
        BadRecord: it has no text.
    """
    text = record.get(job.text_field)
    if not isinstance(text, str):
        fields = ", ".join(str(name)[:40] for name in list(record)[:20]) or "none"
        what = "no field" if job.text_field not in record else f"a {type(text).__name__} in field"
        raise BadRecord("fields", f"has {what} {job.text_field!r} (fields: {fields}); name the one that "
                                  "holds text in text_field")
    try:
        # Encoded once, for the size and to find what UTF-8 cannot hold.
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise BadRecord("utf8", "holds half of a surrogate pair (an escape such as \\ud800), which is no "
                                "character; remove it") from None
    if size_bytes > job.options.document_bytes:
        raise BadRecord("too_long", f"holds more than document_bytes = {job.options.document_bytes:,} bytes "
                                    "of text; cut it, or raise the limit")
    if not text.strip():
        raise BadRecord(EMPTY, "holds no text")
    return RawDocument(text, place, build_columns({name: v for name, v in record.items()
                                                   if name != job.text_field}))


def build_columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says beside its text: strings under the names that all formats share, and the rest
    as it is, without what is long or nested deep."""
    columns: dict[str, Any] = {}
    for name, value in fields.items():
        known = COLUMN_NAMES.get(name.lower())
        plain = _plain(value)
        # The first field of a meaning counts; a second keeps its own name.
        if known is not None and known not in columns and isinstance(plain, (str, int, float)):
            columns[known] = _text(str(plain))
        elif _is_short(plain) and not _is_deep(plain, MAX_FIELD_DEPTH):
            columns[_text(name)] = _text(plain) if isinstance(plain, str) else plain
    return drop_empty(columns)


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    try:
        # Through JSON: what other programs read has the same types, and NaN is refused.
        return json.loads(json.dumps(value, default=str, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def _is_short(value: Any) -> bool:
    return len(value if isinstance(value, str) else json.dumps(value)) <= MAX_FIELD_CHARS


def _is_deep(value: Any, most: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(most == 0 or _is_deep(one, most - 1) for one in inner)


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()[:MAX_FIELD_CHARS]


TEXT_SUFFIXES = frozenset([".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log",
                           ".srt"])
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


class _SpansReader(FileReader):
    """A reader whose large files are read in parts."""

    read_as: ClassVar[str]
    """Ending of its files, which those that the settings name need not have."""

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Yield the parts of a file: of about 8 MiB, a compressed one as a whole."""
        for span in iter_spans(self.source.get_file(name), read_as=self.read_as):
            yield SourcePiece(self.format, name, span.start, span.stop, span.size_bytes)


@dataclass(frozen=True)
class TextOptions(EncodingLimits):
    """Options of plain text."""

    encoding: Encoding = "utf-8"
    """Of all files; "detect": each one's own."""
    cut_bytes: LimitBytes = DOCUMENT_BYTES
    """Files above 1 MB are cut at blank lines into documents of at most so much."""


class TextReader(_SpansReader):
    """Text files: each is a document, large ones several."""

    format = "text"
    read_as = ".txt"
    suffixes = TEXT_SUFFIXES
    Options = TextOptions

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Yield the parts of a file; only UTF-8 can be cut before it is read."""
        yield from super().split_file(name) if self.options.encoding == "utf-8" else FileReader.split_file(
            self, name)

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        options: TextOptions = job.options
        with open_unpacked(job.file) as stream:
            blocks = _part(stream, job)
            size_bytes = job.piece.stop - job.piece.start
            if _is_packed(job) or options.encoding != "utf-8":  # of a bomb no part becomes a document
                whole = b"".join(blocks)
                if options.encoding != "utf-8":
                    whole = decode_text(whole, options.encoding).encode()
                blocks, size_bytes = iter([whole]), len(whole)
            is_whole = size_bytes <= WHOLE_FILE_BYTES and not _is_part(job)
            limit_bytes = max(size_bytes, 1) if is_whole else options.cut_bytes
            position = job.piece.start
            for piece in cut_at_blank_lines(blocks, limit_bytes):
                # Positions count the bytes of the file, the mark's included.
                raw = piece.removeprefix(BYTE_ORDER_MARK) if position == 0 else piece
                place = job.name if is_whole else f"{job.name}:{position}"
                try:
                    text = decode_text(raw, "utf-8")
                    if text.strip():
                        yield RawDocument(text, place)
                    else:
                        yield job.build_broken(BadRecord(EMPTY, "holds no text"), place, is_left_out=True)
                except BadRecord as e:
                    yield job.build_broken(e, place)
                position += len(piece)
            if position == job.piece.start:
                yield job.build_broken(BadRecord(EMPTY, "holds no text"), is_left_out=True)


class JsonlReader(_SpansReader):
    """JSON lines: each is a document."""

    format = "jsonl"
    read_as = ".jsonl"
    suffixes = JSONL_SUFFIXES

    @classmethod
    def iter_items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        """Yield the whole part: its time limit is one for each line."""
        yield SourceItem(job.name, lambda: cls.iter_documents(job))

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        # JSON escapes may double a text, and a line has other fields too.
        limit_bytes = 2 * job.options.document_bytes
        # lines of a part are counted from its first: to know the others a process would read them again
        prefix = f"{job.name}:{job.piece.start}+" if job.piece.start else f"{job.name}:"
        with open_unpacked(job.file) as stream:
            for number, line in enumerate(split_lines(_part(stream, job), limit_bytes), 1):
                place = f"{prefix}{number}"
                if number == 1 and not job.piece.start:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                try:
                    if len(line) > limit_bytes:
                        raise BadRecord("too_long", f"is a line of more than {limit_bytes:,} bytes; cut it, "
                                                    "or raise document_bytes")
                    yield build_document(_record(line), place, job)
                except BadRecord as e:
                    yield job.build_broken(BadRecord(e.code, str(e), content=line[:1000]), place,
                                     is_left_out=e.code == EMPTY)


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 (byte {e.start}); {explain_bytes(line)}") from None
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({str(e)[:120]}); each line must be one JSON object"
                        ) from None
    if not isinstance(record, dict):
        raise BadRecord("json", f"is a JSON {type(record).__name__}, must be an object")
    return record


def _is_part(job: ReadingJob) -> bool:
    return not _is_packed(job) and (job.piece.start > 0 or job.piece.stop < job.file.stat().st_size)


def _is_packed(job: ReadingJob) -> bool:
    return Path(job.piece.file).suffix.lower() in COMPRESSED


def _part(stream: IO[bytes], job: ReadingJob) -> Iterator[bytes]:
    if _is_packed(job):
        is_text = job.piece.format == "text"  # which is held in memory
        yield from iter_limited_blocks(stream, job.piece.size_bytes,
                                 job.options.unpacked_bytes if is_text else math.inf)
        return
    stream.seek(job.piece.start)
    left = job.piece.stop - job.piece.start
    while left and (block := stream.read(min(left, _BLOCK_BYTES))):
        left -= len(block)
        yield block


def split_lines(blocks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Yield lines; of one that is longer than the limit its beginning, one byte more than the limit."""
    parts: list[bytes] = []
    held = 0
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for line in ended:
            yield b"".join([*parts, line])[:limit_bytes + 1]
            parts, held = [], 0
        # What is longer than the limit is read on to its end, and not held.
        if rest and held <= limit_bytes:
            parts.append(rest)
            held += len(rest)
    if parts:
        yield b"".join(parts)[:limit_bytes + 1]
