"""Read file spans as documents, and report bad records in between."""

import codecs
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from megatron_sov.base.documents.files import (
    ARROW_SUFFIXES, BYTE_ORDER_MARK, DOCUMENT_BYTES, JSON_SUFFIX, JSONL_SUFFIXES, PARQUET_SUFFIX,
    TEXT_SUFFIXES, WHOLE_FILE_BYTES, FileSpan, cut_at_blank_lines, is_json, is_records, iter_spans,
    list_files, open_bytes, open_parquet)
from megatron_sov.base.documents.layouts import LAYOUT_FIELDS, Renames, unread_fields
from megatron_sov.base.documents.records import (
    DIALOGUE, BadRecord, Document, RecordParser, RecordReading, create_length_error, decode_utf8,
    explain_bytes, find_table_problem, list_read_fields, parse_json_value, parse_line, parse_record)
from megatron_sov.base.errors import UserError

_ESCAPE_CHARS = 16
"""Characters at the end of a window that may begin an escape, word or number."""
MAX_REPORT_BYTES = 1000
"""Bytes of a bad record quoted in the report."""
_BLOCK_BYTES = 1 << 20
_JSON_BEGINS = re.compile(rb'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
"""Beginning of JSON (a list, lines or an object); plain text begins differently."""
BINARY_SUFFIXES = (".xlsx", ".xls", ".ods", ".docx", ".doc", ".pptx", ".pdf", ".epub")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Plain-text table suffix -> column separator."""


def iter_json_items(read: Callable[[int], bytes], limit_bytes: int) -> Iterator[Any]:
    """Yield the items of a JSON list; the first error is yielded as a `BadRecord` and ends the list.

    Args:
        read: returns at most the given number of bytes; b"" at the end of the file.
        limit_bytes: limit of one item.
    """
    window = _ByteWindow(read, limit_bytes)
    try:
        if window.next_char() != "[":
            raise BadRecord("json", "is not a JSON list; pass a list of records, or JSON Lines")
        # parse value by value instead of the whole file
        window.at += 1
        if window.next_char() != "]":
            yield window.parse_item()
            while window.next_char() == ",":
                window.at += 1
                yield window.parse_item()
        if window.next_char() != "]":
            raise BadRecord("json", "is not valid JSON: a ',' or the list's ']' must stand before it; "
                                    "correct it, or fetch it again")
        window.at += 1
        if window.next_char():
            raise BadRecord("json", "has more after the end of its list; keep one list in a file, or write "
                                    "JSON Lines")
    except BadRecord as e:
        yield e


class _ByteWindow:
    """A decoded window into a file, with the current position."""

    def __init__(self, read: Callable[[int], bytes], limit_bytes: int) -> None:
        self._read, self._limit = read, limit_bytes
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self.at, self._is_whole = "", 0, False

    def next_char(self) -> str:
        """Move to the next character that is not blank, and return the character; "" at the end."""
        while True:
            while self.at < len(self._text):
                if (char := self._text[self.at]) not in " \t\r\n":
                    return char
                self.at += 1
            if self._is_whole:
                return ""
            self._grow()

    def parse_item(self) -> Any:
        """Parse the next item and move past it. Raises `BadRecord`: invalid JSON, or too long."""
        self.next_char()
        while True:
            try:
                # each attempt starts at the item's beginning; `_grow` doubles the window, so the total work
                # is linear
                value, end = json.JSONDecoder().raw_decode(self._text, self.at)
                # a number may continue after the window, such as 1 in 1.5 and 1e+5
                is_complete = isinstance(value, (dict, list, str)) or end + len("e+") < len(self._text)
                if is_complete or self._is_whole:
                    self.at = end
                    return value
            except json.JSONDecodeError as e:
                # an error close to the end may only come from the window's end
                is_cut = e.pos > len(self._text) - _ESCAPE_CHARS or e.msg.startswith("Unterminated string")
                if self._is_whole or not is_cut:
                    raise BadRecord("json", f"is not valid JSON ({e.msg}); the rest of the file is not read; "
                                            "correct it") from None
            except (ValueError, RecursionError) as e:
                raise BadRecord("json", f"is not valid JSON ({str(e)[:100]}); the rest of the file is not "
                                        "read; correct it") from None
            # without this limit, a missing quote would load the whole file into memory
            if len(self._text) - self.at > self._limit:
                raise BadRecord("too_long", f"is longer than --max-document-bytes {self._limit}; cut it, or "
                                            "raise the limit; the rest of the file is not read")
            self._grow()

    def _grow(self) -> None:
        """Read at least as many bytes as the window holds: an item is then parsed only a few times."""
        # drop the text before the current position
        remaining = max(_BLOCK_BYTES, len(self._text) - self.at)
        parts = [self._text[self.at:]]
        try:
            while remaining > 0 and not self._is_whole:
                block = self._read(remaining)
                self._is_whole = not block
                remaining -= len(block)
                parts.append(self._decode(block, self._is_whole))
        except UnicodeDecodeError as e:
            raise BadRecord("utf8", f"is not UTF-8 ({e.reason}); {explain_bytes(e.object, is_begin=False)}; "
                                    "it and the rest after it are not read") from None
        self._text, self.at = "".join(parts), 0


def read_documents(files: Iterable[Path], reading: RecordReading | None = None) -> Iterator[Document]:
    """Yield the non-empty documents in `files`, in order. Raises `UserError`: a file is unreadable or not
    UTF-8, or has a malformed record (named by line or row)."""
    reading = reading or RecordReading()
    for file in files:
        line = 0
        # spans count lines from their own start; `line` is the number of lines before the span
        for span in iter_spans(file):
            counted = CountedSpan(span, reading)
            for item in counted:
                if isinstance(item, Document):
                    yield item
                elif item.code != "empty":
                    raise UserError(f"{format_location(file, item, line)}: {item.reason}")
            line += counted.num_lines


def read_records(path: Path, tell: Callable[[str], object] = lambda sentence: None,
                 renames: Renames = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location "FILE:NUMBER", fields) per record in a file or dataset folder, without conversion.

    A folder's files of records are known by their endings; a file in `path` with another ending holds JSON
    lines or a JSON list.

    Args:
        tell: as in `list_files`.
        renames: columns of a table that hold messages, in addition to those with known names.

    Raises:
        UserError: the path has no records, or a malformed one.
    """
    files = [file for file in list_files(path, tell)
             if file == path or is_records(file.name) or is_json(file.name)]
    if not files:
        raise UserError(f"{path}: holds no records; pass a .jsonl, .json, .parquet or .arrow file, or a "
                        "folder with such files")
    for file in files:
        lines_before = 0
        for span in iter_spans(file, read_as="" if is_records(file.name) else JSON_SUFFIX):
            counted = CountedSpan(span, RecordReading("prompt", renames=renames), _number_fields)
            for item in counted:
                if isinstance(item, BadRecord):
                    raise UserError(f"{format_location(file, item, lines_before)}: {item.reason}")
                number, record = cast(tuple[int, dict[str, Any]], item)
                yield f"{file}:{lines_before + number}", record
            lines_before += counted.num_lines


def find_unread_fields(span: FileSpan, reading: RecordReading) -> list[str]:
    """Return the non-empty unread fields of a span's first chat or preference record; []: none."""
    def parse(record: dict[str, Any], where: str, number: int, _: RecordReading) -> list[str]:
        return unread_fields(record, reading.kind or "chat", reading.renames, list_read_fields(reading))

    # as prompts: for prompts, every table column is read
    fields = next(iter(CountedSpan(span, RecordReading("prompt"), parse)), None)
    return fields if isinstance(fields, list) else []


def _number_fields(record: dict[str, Any], where: str, number: int, reading: RecordReading,
                   ) -> tuple[int, dict[str, Any]]:
    return number, record


def format_location(file: Path, item: BadRecord, lines_before: int) -> str:
    """Format a bad record's location: file, and line or row."""
    return f"{file}:{lines_before + item.line}" if item.line else str(file)


def read_span(span: FileSpan, reading: RecordReading) -> Iterator[Document | BadRecord]:
    """Yield documents and bad records of a span, in order; lines count from 1 at the span's start."""
    return iter(CountedSpan(span, reading))


class CountedSpan:
    """Iterates over a span's documents and bad records, then has the number of lines in `num_lines`."""

    def __init__(self, span: FileSpan, reading: RecordReading, parse: RecordParser = parse_record) -> None:
        self.span, self.reading, self.parse = span, reading, parse
        self.num_lines = 0

    def __iter__(self) -> Iterator[Document | BadRecord]:
        """Read the span. Raises `UserError`: the file is unreadable."""
        try:
            if self.span.suffix == PARQUET_SUFFIX or self.span.suffix in ARROW_SUFFIXES:
                yield from self._read_table()
            else:
                with _open_span(self.span) as f:
                    yield from self._read_bytes(f)
        except BadRecord as e:
            yield e
        except OSError as e:
            raise UserError(f"{self.span.file}: cannot be read ({e.strerror or e}); "
                            "check the path and its permissions") from e

    def _read_table(self) -> Iterator[Document | BadRecord]:
        """Read Parquet row groups or an Arrow file."""
        # not at the top: pyarrow is slow to import, and `--help` reads no data
        from megatron_sov.base.documents import arrow_rows

        span = self.span
        if span.suffix == PARQUET_SUFFIX:
            file = open_parquet(span.file)
            columns = _choose_columns(file.schema_arrow.names, self.reading)
            batches = arrow_rows.iter_parquet_batches(file, range(span.start, span.stop), columns)
            yield from self._convert_rows(batches, columns, arrow_rows.convert_value)
        else:
            with arrow_rows.open_arrow_batches(span.file) as (names, batches):
                columns = _choose_columns(names, self.reading)
                yield from self._convert_rows(batches, columns, arrow_rows.convert_value)
    def _read_bytes(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        if self.span.suffix in JSONL_SUFFIXES:
            return self._iter_lines(f)
        if self.span.suffix != JSON_SUFFIX:
            return self._iter_pieces(f)
        # open the file again: a compressed stream cannot seek back
        with _open_span(self.span) as beginning:
            head = _read_guarded(beginning.read, _BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
        return self._iter_items(f) if head.startswith(b"[") else self._iter_lines(f)

    def _iter_items(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        for item in iter_json_items(lambda size: _read_guarded(f.read, size),
                                    self.reading.max_document_bytes):
            self.num_lines += 1
            try:
                if isinstance(item, BadRecord):
                    raise item
                yield parse_json_value(item, f"{self.span.file}:{self.num_lines}", self.num_lines,
                                       self.reading, self.parse)
            except BadRecord as e:
                yield _at_line(e, self.num_lines, b"")

    def _iter_lines(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        """Yield the documents of the span's JSON lines; an overlong line is skipped without loading it."""
        limit = self.reading.max_document_bytes
        # a compressed file is a single span, whose size does not limit the length of the text
        remaining = float("inf") if self.span.compression else self.span.stop - self.span.start
        while remaining > 0 and (line := _read_guarded(f.readline, limit + 1)):
            self.num_lines += 1
            remaining -= len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                # skip the rest of an overlong line block by block
                while (rest := _read_guarded(f.readline, _BLOCK_BYTES)):
                    remaining -= len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield _at_line(create_length_error(self.reading), self.num_lines, line)
            elif line.strip():
                if self.num_lines == 1 and self.span.start == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                try:
                    yield parse_line(line, f"{self.span.file}:{self.num_lines}", self.num_lines, self.reading,
                                     self.parse)
                except BadRecord as e:
                    yield _at_line(e, self.num_lines, line)

    def _iter_pieces(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        """Yield the documents of the span's plain text, cut at blank lines. Raises `BadRecord`: no text."""
        span = self.span
        if span.suffix in TABLE_SUFFIXES and span.start == 0:
            self._refuse_table()
        if span.suffix in BINARY_SUFFIXES:
            raise BadRecord("binary", "is a spreadsheet or document, not text; extract its text by "
                                      "`sov-data run`, or save a table as .csv")
        if self.reading.kind not in (None, "text"):
            raise BadRecord("fields", f"is plain text, but --format is {self.reading.kind}; "
                                      "pack it on its own with --format text", options=("--format", "text"))
        if fields := (*self.reading.columns, *filter(None, [self.reading.bucket_by]), *self.reading.tags):
            raise BadRecord("fields", f"is plain text, which has no field {fields[0]!r}; "
                                      "pass JSONL or Parquet")
        position = span.start
        # endings that do not declare the content: JSON data would be trained as text
        is_vague = span.suffix in (".txt", ".text") or span.suffix not in TEXT_SUFFIXES
        blocks = _iter_blocks(f, None if span.compression else span.stop - span.start)
        limit_bytes = span.document_bytes
        if span.compression:  # the size is only known after decompression
            first = b"".join(_take_blocks(blocks, WHOLE_FILE_BYTES))
            limit_bytes = max(len(first), 1) if len(first) <= WHOLE_FILE_BYTES else DOCUMENT_BYTES
            blocks = itertools.chain([first], blocks)
        for piece in cut_at_blank_lines(blocks, min(limit_bytes, self.reading.max_document_bytes)):
            # `position` counts bytes of the file including the mark: messages show offsets in the file
            raw = piece.removeprefix(BYTE_ORDER_MARK) if position == 0 else piece
            if position == 0 and is_vague and _JSON_BEGINS.match(raw):
                raise BadRecord("json", "is JSON and not plain text; name it with the ending .json (a list "
                                        "of records) or .jsonl (a record on each line)")
            try:
                text = decode_utf8(raw, position + len(piece) - len(raw))
                if not text.strip():
                    raise BadRecord("empty", f"holds no text at offset {position}")
                yield from self._iter_documents(text)
            except BadRecord as e:
                yield _at_line(e, 0, raw)
            position += len(piece)

    def _iter_documents(self, text: str) -> Iterator[Document]:
        if not self.reading.by_line:
            yield Document(str(self.span.file), text)
            return
        # only line feeds end a line: further separators known to `splitlines` may be part of a text
        for line in text.removesuffix("\n").split("\n"):
            self.num_lines += 1
            if line.strip():
                yield Document(str(self.span.file), line.removesuffix("\r"), line=self.num_lines)

    def _refuse_table(self) -> None:
        """Refuse a table in plain text, which has no column types: lists in its cells are not JSON."""
        with _open_span(self.span) as f:
            head = _read_guarded(f.readline, _BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
        cells = head.decode(errors="replace").split(TABLE_SUFFIXES[self.span.suffix])
        names = [name.strip().strip('"') for name in cells]
        # columns with names of known fields: the table contains records
        record_fields = {self.reading.text_field, *DIALOGUE, *LAYOUT_FIELDS}
        if self.reading.kind not in (None, "text") or record_fields & {*names}:
            raise BadRecord("table", f"is a table (columns: {', '.join(names)[:200]}); save it as Parquet or "
                                     "JSON lines, e.g. with to_parquet or to_json of `datasets`")

    def _convert_rows(self, batches: Iterator[Any], columns: list[str],
                      convert_value: Callable[[Any, bool], Any]) -> Iterator[Document | BadRecord]:
        # columns of a reward keep their nulls
        padded = {*DIALOGUE, *(name for target, sources in self.reading.renames if target in DIALOGUE
                               for name in sources)}
        for batch in batches:
            for i in range(batch.num_rows):
                self.num_lines += 1
                try:
                    record = {name: convert_value(batch.column(name)[i], name in padded) for name in columns}
                    yield self.parse(record, f"{self.span.file}:{self.num_lines}", self.num_lines,
                                     self.reading)
                except BadRecord as e:
                    yield _at_line(e, self.num_lines, b"")


def _at_line(bad: BadRecord, line: int, raw: bytes) -> BadRecord:
    return BadRecord(bad.code, bad.reason, line, raw[:MAX_REPORT_BYTES], bad.options)


def _open_span(span: FileSpan) -> IO[bytes]:
    f = open_bytes(span.file, span.compression)
    if not span.compression:
        f.seek(span.start)
    return f


def _read_guarded(read: Callable[[int], bytes], size: int) -> bytes:
    """Read from a possibly compressed stream. Raises `BadRecord`: truncated or damaged data."""
    try:
        return read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BadRecord("truncated", f"is cut off or damaged ({e}); what came before is read; "
                                     "fetch the file again") from None


def _iter_blocks(f: IO[bytes], remaining: int | None) -> Iterator[bytes]:
    """Yield up to `remaining` bytes from a stream (None: until the end) in blocks."""
    while ((size := _BLOCK_BYTES if remaining is None else min(_BLOCK_BYTES, remaining))
           and (block := _read_guarded(f.read, size))):
        remaining = None if remaining is None else remaining - len(block)
        yield block


def _take_blocks(blocks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Yield blocks until their total size exceeds `limit_bytes`."""
    size_bytes = 0
    while size_bytes <= limit_bytes and (block := next(blocks, b"")):
        size_bytes += len(block)
        yield block


def _choose_columns(names: list[str], reading: RecordReading) -> list[str]:
    """Return the columns to read: every column for prompts, otherwise the kind's fields. Raises `BadRecord`:
    the rows are of another kind, or two columns have the same name."""
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise BadRecord("parquet", f"has two columns {name!r}; rename or remove one")
    # a prompt's remaining columns are for the reward
    if reading.kind == "prompt":
        return names
    if problem := find_table_problem(names, reading):
        raise problem
    needed = {"id", reading.bucket_by, *reading.columns, *reading.tags, *(["media"] if reading.media else [])}
    if reading.kind in (None, "text"):
        needed.add(reading.text_field)
    if reading.kind != "text":
        needed |= list_read_fields(reading)
    return [name for name in names if name in needed]
