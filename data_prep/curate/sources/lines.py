"""Readers for plain text and JSON lines, compressed or not."""

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from data_prep.curate.sources.encodings import (
    Encoding, EncodingLimits, LimitBytes, decode_text, iter_limited_blocks, open_unpacked)
from data_prep.curate.sources.reader import EMPTY, FileReader, ReadingJob, check_text, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourcePiece
from megatron_sov.base.documents import DOCUMENT_BYTES, WHOLE_FILE_BYTES, BadRecord, cut_at_blank_lines
from megatron_sov.base.documents.files import BYTE_ORDER_MARK, COMPRESSED_SUFFIXES, JSONL_SUFFIXES, iter_spans
from megatron_sov.base.documents.records import RecordReading, parse_line

COLUMN_NAMES = {
    "id": "own_id", "_id": "own_id", "url": "url", "uri": "url", "link": "url", "title": "title",
    "date": "date", "timestamp": "date", "created": "date", "licence": "licence", "license": "licence",
    "language": "language_hint", "lang": "language_hint"}
"""Field in a record -> column; further fields keep their names."""
MAX_FIELD_CHARS, MAX_FIELD_DEPTH = 4000, 20
"""Limits for fields other than the text; longer or deeper fields are left out."""
TEXT_SUFFIXES = frozenset([".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log",
                           ".srt"])
_BLOCK_BYTES = 1 << 20


def build_document(record: Mapping[str, Any], place: str, job: ReadingJob) -> RawDocument:
    """Return the document in a JSON or table record; raises `BadRecord` for a record without text."""
    text = record.get(job.text_field)
    if not isinstance(text, str):
        fields = ", ".join(str(name)[:40] for name in list(record)[:20]) or "none"
        problem = "no field" if job.text_field not in record else f"a {type(text).__name__} in field"
        raise BadRecord("fields", f"has {problem} {job.text_field!r} (fields: {fields}); name the one that "
                                  "holds text in text_field")
    check_text(text, job.options.document_bytes)
    fields_besides_text = {name: value for name, value in record.items() if name != job.text_field}
    return RawDocument(text, place, build_columns(fields_besides_text))


def build_columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return strings for the fields in `COLUMN_NAMES`, and other fields within the limits unchanged."""
    columns: dict[str, Any] = {}
    for name, value in fields.items():
        column = COLUMN_NAMES.get(name.lower())
        plain = _to_plain_value(value)
        # The first field for a column counts; a second field keeps its name.
        if column is not None and column not in columns and isinstance(plain, (str, int, float)):
            columns[column] = str(plain)[:MAX_FIELD_CHARS]
        elif _is_short(plain) and not _is_deep(plain, MAX_FIELD_DEPTH):
            columns[name[:MAX_FIELD_CHARS]] = plain
    return drop_empty(columns)


def _to_plain_value(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    try:
        # Through JSON, so that other programs read the same types; NaN is rejected.
        return json.loads(json.dumps(value, default=str, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def _is_short(value: Any) -> bool:
    return len(value if isinstance(value, str) else json.dumps(value)) <= MAX_FIELD_CHARS


def _is_deep(value: Any, max_depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(max_depth == 0 or _is_deep(item, max_depth - 1) for item in inner)


class _SpansReader(FileReader):
    """Reads large files in parts."""

    read_as: ClassVar[str]
    """File ending that tells `iter_spans` how to split, whatever a file's own ending is."""

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Yield parts of about 8 MiB; a compressed file is one part."""
        for span in iter_spans(self.source.get_file(name), read_as=self.read_as):
            yield SourcePiece(self.format, name, span.start, span.stop, span.size_bytes)


@dataclass(frozen=True)
class TextOptions(EncodingLimits):
    """Options for `format: text`."""

    encoding: Encoding = "utf-8"
    """Encoding of all files; "detect": guess for each file."""
    cut_bytes: LimitBytes = DOCUMENT_BYTES
    """Maximum document size; files above 1 MB are cut at blank lines."""


class TextReader(_SpansReader):
    """Reads a text file as one document, or as several if the file is large."""

    format = "text"
    read_as = ".txt"
    suffixes = TEXT_SUFFIXES
    Options = TextOptions

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Split UTF-8 files only: other encodings can only be cut after decoding."""
        reader = _SpansReader if self.options.encoding == "utf-8" else FileReader
        yield from reader.split_file(self, name)

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        options: TextOptions = job.options
        with open_unpacked(job.file) as stream:
            blocks = _iter_blocks(stream, job)
            size_bytes = job.piece.stop - job.piece.start
            if _is_packed(job) or options.encoding != "utf-8":
                # Read whole first, so that no part of a decompression bomb becomes a document.
                whole = b"".join(blocks)
                if options.encoding != "utf-8":
                    whole = decode_text(whole, options.encoding).encode()
                blocks, size_bytes = iter([whole]), len(whole)
            is_whole = size_bytes <= WHOLE_FILE_BYTES and not _is_part(job)
            limit_bytes = max(size_bytes, 1) if is_whole else options.cut_bytes
            position = job.piece.start
            for piece in cut_at_blank_lines(blocks, limit_bytes):
                # Positions count the byte order mark, which the text leaves out.
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
    """Reads each line as a document."""

    format = "jsonl"
    read_as = ".jsonl"
    suffixes = JSONL_SUFFIXES

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        # Twice the text limit: JSON escapes lengthen the text, and a line has other fields.
        limit_bytes = 2 * job.options.document_bytes
        # Lines are numbered within the part: numbers within the file would require the parts before.
        prefix = f"{job.name}:{job.piece.start}+" if job.piece.start else f"{job.name}:"
        reading = RecordReading()
        with open_unpacked(job.file) as stream:
            for number, line in enumerate(split_lines(_iter_blocks(stream, job), limit_bytes), 1):
                place = f"{prefix}{number}"
                if number == 1 and not job.piece.start:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                try:
                    if len(line) > limit_bytes:
                        raise BadRecord("too_long", f"is a line of more than {limit_bytes:,} bytes; cut it, "
                                                    "or raise document_bytes")
                    record = parse_line(line, place, number, reading, lambda record, *_: record)
                    yield build_document(record, place, job)
                except BadRecord as e:
                    yield job.build_broken(BadRecord(e.code, str(e), content=line[:1000]), place,
                                           is_left_out=e.code == EMPTY)


def _is_part(job: ReadingJob) -> bool:
    """Return whether the job reads one of several parts of a file."""
    return not _is_packed(job) and (job.piece.start > 0 or job.piece.stop < job.file.stat().st_size)


def _is_packed(job: ReadingJob) -> bool:
    """Return whether the file is compressed."""
    return Path(job.piece.file).suffix.lower() in COMPRESSED_SUFFIXES


def _iter_blocks(stream: IO[bytes], job: ReadingJob) -> Iterator[bytes]:
    if _is_packed(job):
        is_text = job.piece.format == "text"  # read whole, so its size is limited
        yield from iter_limited_blocks(stream, job.piece.size_bytes,
                                       job.options.unpacked_bytes if is_text else math.inf)
        return
    stream.seek(job.piece.start)
    num_bytes = job.piece.stop - job.piece.start
    while num_bytes and (block := stream.read(min(num_bytes, _BLOCK_BYTES))):
        num_bytes -= len(block)
        yield block


def split_lines(blocks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Yield lines; a longer line is cut to `limit_bytes` + 1 bytes, by which the caller recognizes it."""
    parts: list[bytes] = []
    num_bytes = 0
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for line in ended:
            yield b"".join([*parts, line])[:limit_bytes + 1]
            parts, num_bytes = [], 0
        # The rest of an overlong line is read and discarded.
        if rest and num_bytes <= limit_bytes:
            parts.append(rest)
            num_bytes += len(rest)
    if parts:
        yield b"".join(parts)[:limit_bytes + 1]
