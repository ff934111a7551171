"""Read Arrow and Parquet files in batches of rows, and convert their values to Python objects."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc

from megatron_sov.base.documents.records import BadRecord
from megatron_sov.base.errors import first_error_line

_ROWS = 256
"""Most rows in a batch; Parquet batches have fewer if rows are long."""
_ROWS_BYTES = 64 << 20
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""End mark of an Arrow stream: a continuation mark, then length 0."""
_JSON_TYPE = "extension<arrow.json>"


@contextlib.contextmanager
def open_arrow_batches(file: Path) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """Yield the column names, and batches of at most `_ROWS` rows, of an Arrow file or stream. Raises
    `BadRecord`, here or while batches are read: the file is damaged or has another format."""
    try:
        with pyarrow.OSFile(str(file)) as opened:
            begin = opened.read(6)
            # a file begins with magic bytes, a stream with a continuation mark (before 2019: with a length)
            is_file, is_old = begin == b"ARROW1", begin[:4] != _STREAM_END[:4]
            opened.seek(0)
            reader = ipc.open_file(opened) if is_file else ipc.open_stream(opened)
            batches: Iterator[Any]
            if is_file:
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = _iter_stream(reader, opened, is_old)
            yield reader.schema.names, _iter_slices(map(_validate_batch, batches))
    except (pyarrow.ArrowException, OSError) as e:
        reason = first_error_line(e)[:200]
        raise BadRecord("arrow", f"is not an Arrow file, or only a part of one ({reason}); the batches "
                                 "before the damage are read; fetch it again") from None


def _iter_stream(reader: Any, opened: Any, is_old: bool) -> Iterator[Any]:
    """Yield the batches of a stream, and check its end mark: nothing else shows a truncation between batches.

    The end mark of old streams (before 2019) cannot be distinguished from data.
    """
    yield from reader
    opened.seek(max(0, opened.size() - len(_STREAM_END)))
    if not is_old and opened.read() != _STREAM_END:
        raise pyarrow.ArrowInvalid("the end of the stream is missing")


def _validate_batch(batch: Any) -> Any:
    batch.validate(full=True)
    return batch


def _iter_slices(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def iter_parquet_batches(file: Any, row_groups: range, columns: list[str] | None = None, *,
                         use_threads: bool = True) -> Iterator[Any]:
    """Yield rows of Parquet row groups in batches of at most `_ROWS` rows and about `_ROWS_BYTES`."""
    try:
        for number in row_groups:
            group = file.metadata.row_group(number)
            # estimate from the mean row size of the group
            rows = _ROWS_BYTES * max(group.num_rows, 1) // max(group.total_byte_size, 1)
            yield from file.iter_batches(batch_size=min(max(rows, 1), _ROWS), row_groups=[number],
                                         columns=columns, use_threads=use_threads)
    except (pyarrow.ArrowException, OSError) as e:
        raise BadRecord("parquet", f"is damaged ({first_error_line(e)[:200]}); what came before is read; "
                                   "fetch it again") from None


def convert_value(scalar: Any, is_padded: bool) -> Any:
    """Convert an Arrow scalar to a Python value. `is_padded`: whether to remove the nulls that the table adds
    to objects. Raises `BadRecord`: the text is not UTF-8, or Python lacks the value."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 ({e.reason} at byte {e.start} of a column)") from None
    except (LookupError, OverflowError, ValueError) as e:  # a date or time zone outside Python's range
        raise BadRecord("parquet", f"has a value that cannot be read ({type(e).__name__}: {e})") from None
    return _remove_padding(value, scalar.type) if is_padded or _JSON_TYPE in str(scalar.type) else value


def _remove_padding(value: Any, form: Any) -> Any:
    """Remove the nulls that a table adds to objects, which share the fields of all objects in their column.

    A field that is null in the whole file was written as null and stays. Strings of Arrow's JSON type become
    JSON values with their nulls: `datasets` stores values of several types this way, such as arguments of
    calls.
    """
    if value is None:
        return None
    if str(form) == _JSON_TYPE:
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as e:
            raise BadRecord("json", f"has {str(value)[:40]!r} in a column of JSON, which is not JSON "
                                    f"({e})") from None
    if pyarrow.types.is_struct(form):
        return {field.name: _remove_padding(value[field.name], field.type) for field in form
                if value[field.name] is not None or pyarrow.types.is_null(field.type)}
    if isinstance(value, list) and hasattr(form, "value_type"):
        return [_remove_padding(part, form.value_type) for part in value]
    return value
