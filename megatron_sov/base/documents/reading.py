"""Reading spans: bytes to documents, with what is bad told apart and the good kept."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from megatron_sov.base.documents.files import (
    ARROW_SUFFIXES, BYTE_ORDER_MARK, DOCUMENT_BYTES, JSON_SUFFIX, JSONL_SUFFIXES, PARQUET_SUFFIX,
    TEXT_SUFFIXES, WHOLE_FILE_BYTES, FileSpan, arrow_batches, cut_at_blank_lines, is_records, list_files,
    open_bytes, open_parquet, spans_of)
from megatron_sov.base.documents.layouts import FOREIGN, Renames, unread_fields
from megatron_sov.base.documents.records import (
    DIALOGUE, BadRecord, Document, Parse, RecordReading, columns_problem, decode, fields_read, parse_line,
    parse_object, parse_record, too_long)
from megatron_sov.base.errors import UserError, first_line

_ESCAPE_CHARS = 16
"""An error so near to the end of what is read may be of something that is not read to its end."""


def json_items(read: Callable[[int], bytes], limit_bytes: int) -> Iterator[Any]:
    """Yield the items of a list; what cannot be read as one is a `BadRecord`, the last that is yielded.

    Args:
        read: returns at most so many bytes of the file; none at its end.
        limit_bytes: of an item.
    """
    window = _ByteWindow(read, limit_bytes)
    try:
        if window.sign() != "[":
            raise BadRecord("json", "is no list in JSON; pass a list of records, or JSON Lines")
        # one value after the other, instead of json.loads of the whole file
        window.at += 1
        if window.sign() != "]":
            yield window.item()
            while window.sign() == ",":
                window.at += 1
                yield window.item()
        if window.sign() != "]":
            raise BadRecord("json", "is not valid JSON: a ',' or the list's ']' must stand before it; mend "
                                    "it, or fetch it again")
        window.at += 1
        if window.sign():
            raise BadRecord("json", "has more behind the end of its list; keep one list in a file, or write "
                                    "JSON Lines")
    except BadRecord as e:
        yield e


class _ByteWindow:
    """What is read of the file, and where in it one is."""

    def __init__(self, read: Callable[[int], bytes], limit_bytes: int) -> None:
        self._read, self._limit = read, limit_bytes
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self.at, self._is_whole = "", 0, False

    def sign(self) -> str:
        """Go to the next character that is no blank, and return it; empty at the end."""
        while True:
            while self.at < len(self._text):
                if (char := self._text[self.at]) not in " \t\r\n":
                    return char
                self.at += 1
            if self._is_whole:
                return ""
            self._grow()

    def item(self) -> Any:
        """Return the item that begins here, and go behind it.

        Raises:
            BadRecord: it is no JSON, or too long.
        """
        self.sign()
        while True:
            try:
                # tried from the item's begin each time; `_grow` doubles, so all tries together read a few
                # times its length
                found, end = json.JSONDecoder().raw_decode(self._text, self.at)
                # a number may go on behind what is read, as 1 does in 1.5 and 1e+5
                ends = isinstance(found, (dict, list, str)) or end + len("e+") < len(self._text)
                if ends or self._is_whole:
                    self.at = end
                    return found
            except json.JSONDecodeError as e:
                # an error close to the end may only be where the window ends: an escape, a word or a number
                # that is cut
                is_cut = e.pos > len(self._text) - _ESCAPE_CHARS or e.msg.startswith("Unterminated string")
                if self._is_whole or not is_cut:
                    raise BadRecord("json", f"is not valid JSON ({e.msg}); the rest of the file is not read; "
                                            "mend it") from None
            except (ValueError, RecursionError) as e:
                raise BadRecord("json", f"is not valid JSON ({str(e)[:100]}); the rest of the file is not "
                                        "read; mend it") from None
            # an item without an end, a missing quote say, must not pull the whole file into memory
            if len(self._text) - self.at > self._limit:
                raise BadRecord("too_long", f"is longer than --max-document-bytes {self._limit}; cut it, or "
                                            "raise the limit; the rest of the file is not read")
            self._grow()

    def _grow(self) -> None:
        """Read on, at least so much as is held: an item is begun again a few times only."""
        # what was read before the item is dropped
        left = max(_BLOCK_BYTES, len(self._text) - self.at)
        parts = [self._text[self.at:]]
        try:
            while left > 0 and not self._is_whole:
                block = self._read(left)
                self._is_whole = not block
                left -= len(block)
                parts.append(self._decode(block, self._is_whole))
        except UnicodeDecodeError as e:
            raise BadRecord("utf8", f"is not UTF-8 ({e.reason}); convert it, e.g. iconv -f CP949 -t UTF-8; "
                                    "it and what comes behind it are not read") from None
        self._text, self.at = "".join(parts), 0


KEPT_BYTES = 1000
"""What is kept of a bad record's content."""
_BLOCK_BYTES = 1 << 20
_ROWS = 256
"""Rows of a Parquet file that are decoded at a time, and fewer of long ones."""
_ROWS_BYTES = 64 << 20
_JSON_BEGINS = re.compile(rb'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
"""How a list, lines or one object of JSON begin, and no plain text does."""
_JSON_TYPE = "extension<arrow.json>"
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Suffixes of tables in plain text -> the separator of columns."""


def read_documents(files: Iterable[Path], reading: RecordReading | None = None) -> Iterator[Document]:
    """Yield the non-empty documents of files, in order.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or has a malformed record (named by line or row).
    """
    reading = reading or RecordReading()
    for file in files:
        line = 0
        # spans count their own lines; `line` makes them lines of the file for messages
        for span in spans_of(file):
            counted = CountedSpan(span, reading)
            for item in counted:
                if isinstance(item, Document):
                    yield item
                elif item.code != "empty":
                    raise UserError(f"{place(file, item, line)}: {item.reason}")
            line += counted.num_lines


def read_records(path: Path, tell: Callable[[str], object] = lambda sentence: None,
                 renames: Renames = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each record of a file or a dataset's folder stands, for messages, and its fields as they
    are.

    Args:
        path: the file or folder.
        tell: as `list_files` has it.
        renames: which columns of a table hold messages, beside those with a known name.

    Raises:
        UserError: it holds no records, or one is malformed.
    """
    files = [file for file in list_files(path, tell)
             if is_records(file.name) or file.suffix.lower() == JSON_SUFFIX]
    if not files:
        raise UserError(f"{path}: holds no records; pass a .jsonl, .json, .parquet or .arrow file, or a "
                        "folder with such files")
    for file in files:
        before = 0
        for span in spans_of(file):
            counted = CountedSpan(span, RecordReading("prompt", renames=renames), _fields)
            for item in counted:
                if isinstance(item, BadRecord):
                    raise UserError(f"{place(file, item, before)}: {item.reason}")
                number, record = cast(tuple[int, dict[str, Any]], item)
                yield f"{file}:{before + number}", record
            before += counted.num_lines


def first_unread(span: FileSpan, reading: RecordReading) -> list[str]:
    """Return the fields of a span's first record, a chat or a preference, that hold something and are not
    read; none where there is no such record."""
    def parse(record: dict[str, Any], where: str, number: int, _: RecordReading) -> list[str]:
        return unread_fields(record, reading.kind or "chat", reading.renames, fields_read(reading))

    # as prompts, of which all columns of a table are read
    found = next(iter(CountedSpan(span, RecordReading("prompt"), parse)), None)
    return found if isinstance(found, list) else []


def _fields(record: dict[str, Any], where: str, number: int, reading: RecordReading) -> tuple[int,
                                                                                              dict[str, Any]]:
    return number, record


def place(file: Path, item: BadRecord, lines_before: int) -> str:
    """Return where a bad record stands: the file, and its line or row."""
    return f"{file}:{lines_before + item.line}" if item.line else str(file)


def read_span(span: FileSpan, reading: RecordReading) -> Iterator[Document | BadRecord]:
    """Yield the documents and the bad records of a span, in order; lines count from 1 at its start."""
    return iter(CountedSpan(span, reading))


class CountedSpan:
    """The documents and bad records of a span; when all are read, `num_lines` is the number of
    its lines or rows."""

    def __init__(self, span: FileSpan, reading: RecordReading, parse: Parse = parse_record) -> None:
        self.span, self.reading, self.parse = span, reading, parse
        self.num_lines = 0

    def __iter__(self) -> Iterator[Document | BadRecord]:
        """Read.

        Raises:
            UserError: the file cannot be opened or read.
        """
        span = self.span
        try:
            if span.suffix == PARQUET_SUFFIX:
                file = open_parquet(span.file)
                columns = _columns(file.schema_arrow.names, self.reading)
                yield from self._rows(_batches(file, range(span.start, span.stop), columns), columns)
            elif span.suffix in ARROW_SUFFIXES:
                with arrow_batches(span.file) as (names, batches):
                    columns = _columns(names, self.reading)
                    yield from self._rows(_slices(batches), columns)
            else:
                with _open(span) as f:
                    yield from self._of_bytes(f)
        except BadRecord as e:
            yield e
        except OSError as e:
            raise UserError(f"{span.file}: cannot be read ({e.strerror or e}); "
                            "check the path and its permissions") from e

    def _of_bytes(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        if self.span.suffix in JSONL_SUFFIXES:
            return self._lines(f)
        if self.span.suffix != JSON_SUFFIX:
            return self._pieces(f)
        # opened a second time: a compressed stream cannot go back
        with _open(self.span) as beginning:
            head = _guarded(beginning.read, _BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
        return self._items(f) if head.startswith(b"[") else self._lines(f)

    def _items(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        for item in json_items(lambda size: _guarded(f.read, size), self.reading.max_document_bytes):
            self.num_lines += 1
            try:
                if isinstance(item, BadRecord):
                    raise item
                yield parse_object(item, f"{self.span.file}:{self.num_lines}", self.num_lines, self.reading,
                                   self.parse)
            except BadRecord as e:
                yield _at_line(e, self.num_lines, b"")

    def _lines(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        limit = self.reading.max_document_bytes
        # a compressed file is one span, whose size says nothing of its lines
        left = float("inf") if self.span.compression else self.span.stop - self.span.start
        while left > 0 and (line := _guarded(f.readline, limit + 1)):
            self.num_lines += 1
            left -= len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                # the rest of a line that is too long is passed over in blocks and never held
                while (rest := _guarded(f.readline, _BLOCK_BYTES)):
                    left -= len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield _at_line(too_long(self.reading), self.num_lines, line)
            elif line.strip():
                if self.num_lines == 1 and self.span.start == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                try:
                    yield parse_line(line, f"{self.span.file}:{self.num_lines}", self.num_lines, self.reading,
                                     self.parse)
                except BadRecord as e:
                    yield _at_line(e, self.num_lines, line)

    def _pieces(self, f: IO[bytes]) -> Iterator[Document | BadRecord]:
        span = self.span
        if span.suffix in TABLE_SUFFIXES and span.start == 0:
            self._refuse_table()
        if self.reading.kind not in (None, "text"):
            raise BadRecord("fields", f"is plain text, but --format is {self.reading.kind}; "
                                      "pack it on its own with --format text",
                            options=("--format", "text"))
        if asked := (*self.reading.columns, *filter(None, [self.reading.bucket_by]), *self.reading.tags):
            raise BadRecord("fields", f"is plain text, which has no field {asked[0]!r}; "
                                      "pass JSONL or Parquet")
        position = span.start
        # endings that say nothing of the content; data in JSON would be trained on as text
        is_vague = span.suffix in (".txt", ".text") or span.suffix not in TEXT_SUFFIXES
        blocks = _blocks(f, None if span.compression else span.stop - span.start)
        limit_bytes = span.document_bytes
        if span.compression:  # its size is known only by reading
            first = b"".join(_until(blocks, WHOLE_FILE_BYTES))
            limit_bytes = max(len(first), 1) if len(first) <= WHOLE_FILE_BYTES else DOCUMENT_BYTES
            blocks = _chain(first, blocks)
        for piece in cut_at_blank_lines(blocks, min(limit_bytes, self.reading.max_document_bytes)):
            # `position` counts bytes of the file, the mark included: offsets in messages are those of the
            # file
            raw = piece.removeprefix(BYTE_ORDER_MARK) if position == 0 else piece
            if position == 0 and is_vague and _JSON_BEGINS.match(raw):
                raise BadRecord("json", "is JSON and no plain text; name it with the ending .json (a list of "
                                        "records) or .jsonl (a record on each line)")
            try:
                text = decode(raw, position + len(piece) - len(raw))
                if not text.strip():
                    raise BadRecord("empty", f"holds no text at offset {position}")
                yield from self._documents_of(text)
            except BadRecord as e:
                yield _at_line(e, 0, raw)
            position += len(piece)

    def _documents_of(self, text: str) -> Iterator[Document]:
        if not self.reading.by_line:
            yield Document(str(self.span.file), text)
            return
        # line feeds alone end a line: other signs that Python splits at may be part of a text
        for line in text.removesuffix("\n").split("\n"):
            self.num_lines += 1
            if line.strip():
                yield Document(str(self.span.file), line.removesuffix("\r"), line=self.num_lines)

    def _refuse_table(self) -> None:
        """Refuse a table of records in plain text, which says nothing of types: lists in it are no JSON."""
        with _open(self.span) as f:
            head = _guarded(f.readline, _BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
        found = head.decode(errors="replace").split(TABLE_SUFFIXES[self.span.suffix])
        names = [name.strip().strip('"') for name in found]
        # a table whose columns are fields of records was meant as records
        known = {self.reading.text_field, *DIALOGUE, *FOREIGN}
        if self.reading.kind not in (None, "text") or known & {*names}:
            raise BadRecord("table", f"is a table (columns: {', '.join(names)[:200]}); save it as Parquet or "
                                     "JSON lines, e.g. with to_parquet or to_json of `datasets`")

    def _rows(self, batches: Iterator[Any], columns: list[str]) -> Iterator[Document | BadRecord]:
        # the reward's own columns keep their nulls
        padded = {*DIALOGUE, *(name for target, sources in self.reading.renames if target in DIALOGUE
                               for name in sources)}
        for batch in batches:
            for i in range(batch.num_rows):
                self.num_lines += 1
                try:
                    record = {name: _value(batch.column(name)[i], name in padded) for name in columns}
                    yield self.parse(record, f"{self.span.file}:{self.num_lines}", self.num_lines,
                                     self.reading)
                except BadRecord as e:
                    yield _at_line(e, self.num_lines, b"")


def _at_line(bad: BadRecord, line: int, raw: bytes) -> BadRecord:
    return BadRecord(bad.code, bad.reason, line, raw[:KEPT_BYTES])


def _open(span: FileSpan) -> IO[bytes]:
    f = open_bytes(span.file, span.compression)
    if not span.compression:
        f.seek(span.start)
    return f


def _guarded(read: Callable[[int], bytes], size: int) -> bytes:
    """Read from a stream that may be compressed.

    Raises:
        BadRecord: the compressed data ends too early or is damaged.
    """
    try:
        return read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BadRecord("truncated", f"is cut off or damaged ({e}); what came before is read; "
                                     "fetch the file again") from None


def _blocks(f: IO[bytes], left: int | None) -> Iterator[bytes]:
    """Yield a stream's bytes up to `left` (None: all) in blocks."""
    while ((size := _BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left))
           and (block := _guarded(f.read, size))):
        left = None if left is None else left - len(block)
        yield block


def _until(blocks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Yield blocks until more than `limit_bytes` have been."""
    passed = 0
    while passed <= limit_bytes and (block := next(blocks, b"")):
        passed += len(block)
        yield block


def _chain(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from blocks


def _columns(names: list[str], reading: RecordReading) -> list[str]:
    """Return the columns to read: all of a prompt's, which travel on, else those of the kind.

    Raises:
        BadRecord: the rows are of another kind, or two columns have one name.
    """
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise BadRecord("parquet", f"has two columns {twice[0]!r}; rename or remove one")
    # a prompt's other columns are the reward's, and travel with it
    if reading.kind == "prompt":
        return names
    if problem := columns_problem(names, reading):
        raise problem
    wanted = {"id", reading.bucket_by, *reading.columns, *reading.tags, *(["media"] if reading.media else [])}
    if reading.kind in (None, "text"):
        wanted.add(reading.text_field)
    if reading.kind != "text":
        wanted |= fields_read(reading)
    return [name for name in names if name in wanted]


def _slices(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def _batches(file: Any, row_groups: range, columns: list[str]) -> Iterator[Any]:
    """Yield the rows of row groups, so many at a time that they take about `_ROWS_BYTES`."""
    import pyarrow

    try:
        for number in row_groups:
            group = file.metadata.row_group(number)
            # rows that fit into the bound by the mean of their group; long documents are few at a time
            rows = _ROWS_BYTES * max(group.num_rows, 1) // max(group.total_byte_size, 1)
            yield from file.iter_batches(batch_size=min(max(rows, 1), _ROWS), row_groups=[number],
                                         columns=columns)
    except (pyarrow.ArrowException, OSError) as e:
        raise BadRecord("parquet", f"is damaged ({first_line(e)}); what came before is read; "
                                   "fetch it again") from None


def _value(scalar: Any, is_padded: bool) -> Any:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 ({e.reason} at byte {e.start} of a column)") from None
    except (LookupError, OverflowError, ValueError) as e:  # a day or a time zone that Python does not know
        raise BadRecord("parquet", f"has a value that cannot be read ({type(e).__name__}: {e})") from None
    return _remove_padding(value, scalar.type) if is_padded or _JSON_TYPE in str(scalar.type) else value


def _remove_padding(value: Any, form: Any) -> Any:
    """Return a column's value without the nulls that a table fills in: an object of a table has the fields of
    all other objects in its column.  A field that is null in the whole file was written as null, and stays.

    Strings of Arrow's JSON type become the values that they spell, with their nulls: `datasets` stores values
    of several types so, such as the arguments of calls.

    Args:
        value: as Python has it.
        form: its Arrow type.
    """
    import pyarrow

    if value is None:
        return None
    if str(form) == _JSON_TYPE:
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as e:
            raise BadRecord("json", f"has {str(value)[:40]!r} in a column of JSON, which is none "
                                    f"({e})") from None
    if pyarrow.types.is_struct(form):
        return {field.name: _remove_padding(value[field.name], field.type) for field in form
                if value[field.name] is not None or pyarrow.types.is_null(field.type)}
    if isinstance(value, list) and hasattr(form, "value_type"):
        return [_remove_padding(part, form.value_type) for part in value]
    return value
