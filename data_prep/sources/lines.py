"""Plain text and JSON lines, compressed or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from data_prep.sources.encodings import Encoding, decode_text
from data_prep.sources.job import EMPTY, Item, Job
from data_prep.sources.limits import COMPRESSED, LimitBytes, Limits, blocks_within, unpacked
from data_prep.sources.reader import FileReader
from data_prep.sources.records import raw_of
from data_prep.sources.source import Broken, Piece, Raw
from megatron_sov.documents import DOCUMENT_BYTES, WHOLE_FILE_BYTES, BadRecord, cut_at_blank_lines
from megatron_sov.documents.files import JSONL_SUFFIXES, spans_of

TEXT_SUFFIXES = frozenset([".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log",
                           ".srt"])
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


class _SpansReader(FileReader):
    """A reader whose large files are read in parts."""

    read_as: ClassVar[str]
    """Ending of its files, which those that the settings name need not have."""

    def pieces_of(self, name: str) -> Iterator[Piece]:
        """Yield the parts of a file: of about 8 MiB, a compressed one as a whole."""
        for span in spans_of(self.source.file(name), read_as=self.read_as):
            yield Piece(self.format, name, span.start, span.stop, span.size_bytes)


@dataclass(frozen=True)
class TextOptions(Limits):
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

    def pieces_of(self, name: str) -> Iterator[Piece]:
        """Yield the parts of a file; only UTF-8 can be cut before it is read."""
        yield from super().pieces_of(name) if self.options.encoding == "utf-8" else FileReader.pieces_of(
            self, name)

    @classmethod
    def documents(cls, job: Job) -> Iterator[Raw | Broken]:
        """Yield a part's documents."""
        options: TextOptions = job.options
        with unpacked(job.file) as stream:
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
                raw = piece.removeprefix(BYTE_ORDER_MARK) if position == 0 else piece
                place = job.name if is_whole else f"{job.name}:{position}"
                try:
                    text = decode_text(raw, "utf-8")
                    if text.strip():
                        yield Raw(text, place)
                    else:
                        yield job.broken(BadRecord(EMPTY, "holds no text"), place, is_left_out=True)
                except BadRecord as e:
                    yield job.broken(e, place)
                position += len(piece)
            if position == job.piece.start:
                yield job.broken(BadRecord(EMPTY, "holds no text"), is_left_out=True)


class JsonlReader(_SpansReader):
    """JSON lines: each is a document."""

    format = "jsonl"
    read_as = ".jsonl"
    suffixes = JSONL_SUFFIXES

    @classmethod
    def items(cls, job: Job) -> Iterator[Item]:
        """Yield the whole part: its time limit is one for each line."""
        yield Item(job.name, lambda: cls.documents(job))

    @classmethod
    def documents(cls, job: Job) -> Iterator[Raw | Broken]:
        """Yield a document for each line that has one."""
        limit_bytes = 2 * job.options.document_bytes
        # lines of a part are counted from its first: to know the others a process would read them again
        prefix = f"{job.name}:{job.piece.start}+" if job.piece.start else f"{job.name}:"
        with unpacked(job.file) as stream:
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
                    yield raw_of(_record(line), place, job)
                except BadRecord as e:
                    yield job.broken(BadRecord(e.code, str(e), content=line[:1000]), place,
                                     is_left_out=e.code == EMPTY)


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 (byte {e.start}); convert the file, e.g. iconv -f CP949 "
                                "-t UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({str(e)[:120]}); each line must be one JSON object"
                        ) from None
    if not isinstance(record, dict):
        raise BadRecord("json", f"is a JSON {type(record).__name__}, must be an object")
    return record


def _is_part(job: Job) -> bool:
    """Return whether the file is read in several parts."""
    return not _is_packed(job) and (job.piece.start > 0 or job.piece.stop < job.file.stat().st_size)


def _is_packed(job: Job) -> bool:
    return Path(job.piece.file).suffix.lower() in COMPRESSED


def _part(stream: IO[bytes], job: Job) -> Iterator[bytes]:
    """Yield the bytes of a part; of a compressed file all."""
    if _is_packed(job):
        is_text = job.piece.format == "text"  # which is held in memory
        yield from blocks_within(stream, job.piece.size_bytes,
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
        if rest and held <= limit_bytes:
            parts.append(rest)
            held += len(rest)
    if parts:
        yield b"".join(parts)[:limit_bytes + 1]
