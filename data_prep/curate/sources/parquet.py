"""Parquet files: each row is a document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.curate.sources.lines import build_document
from data_prep.curate.sources.reader import EMPTY, FileReader, ReadingJob, SourceItem
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourcePiece
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import open_parquet
from megatron_sov.base.errors import first_error_line

_PART_BYTES = 64 << 20
_BATCH_ROWS = 256
_BATCH_BYTES = 64 << 20


class ParquetReader(FileReader):
    """Parquet files."""

    format = "parquet"
    suffixes = frozenset([".parquet"])
    compressed = False

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Yield parts of about 64 MiB; each holds the row groups that begin in it, so that nobody has to look
        into a file to know its parts."""
        size_bytes = self.source.get_file(name).stat().st_size
        for start in range(0, max(size_bytes, 1), _PART_BYTES):
            stop = min(start + _PART_BYTES, size_bytes)
            yield SourcePiece(self.format, name, start, stop, stop - start)

    @classmethod
    def iter_items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        try:
            metadata = open_parquet(job.file).metadata
            size_bytes = job.file.stat().st_size
            groups = [n for n in range(metadata.num_row_groups)
                      if job.piece.start <= _begin(metadata.row_group(n), size_bytes) < job.piece.stop]
        except BadRecord as e:
            told = [job.build_broken(e)] if job.piece.start == 0 else []
            yield SourceItem(job.name, lambda: iter(told))
            return
        for number in groups:
            yield SourceItem(f"{job.name}:{number}", _RowGroup(job, number))


def _begin(group: Any, size_bytes: int) -> int:
    """Return the place of a row group's first page; a file says it of each of its columns.  Where it lies,
    the group counts to the file's first part, so that one part reads or tells it."""
    column = group.column(0)
    place: int = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)
    return place if 0 <= place < size_bytes else 0


class _RowGroup:
    """The documents of one row group."""

    def __init__(self, job: ReadingJob, number: int) -> None:
        self._job, self._number = job, number

    def __call__(self) -> Iterator[RawDocument | BrokenRecord]:
        import pyarrow

        job, number = self._job, self._number
        file = open_parquet(job.file)
        group = file.metadata.row_group(number)
        # So many rows that a batch takes about 64 MiB, by the mean of the group.
        rows = _BATCH_BYTES * max(group.num_rows, 1) // max(group.total_byte_size, 1)
        done = 0
        try:
            for batch in file.iter_batches(min(max(rows, 1), _BATCH_ROWS), row_groups=[number],
                                           use_threads=False):
                yield from _documents(batch, f"{job.name}:{number}.", done, job)
                # Rows are counted over batches: places in the source do not depend on their size.
                done += batch.num_rows
        except (pyarrow.ArrowException, OSError) as e:
            raise BadRecord("parquet", f"is damaged ({first_error_line(e)[:200]}); what came before is "
                                       "read; fetch it again") from None


def _documents(batch: Any, prefix: str, done: int, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
    names = batch.schema.names
    for row in range(batch.num_rows):
        place = f"{prefix}{done + row + 1}"
        try:
            yield build_document({name: _value(batch.column(i)[row]) for i, name in enumerate(names)}, place,
                                 job)
        except BadRecord as e:
            yield job.build_broken(e, place, is_left_out=e.code == EMPTY)


def _value(scalar: Any) -> Any:
    """Return a value; None where Python has none for it: nanoseconds, years behind 9999, unknown time
    zones."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 ({e.reason} at byte {e.start} of a column)") from None
    except (ValueError, OverflowError, LookupError):
        return _written(scalar)
    # where pandas is installed nanoseconds are of its own types, which would be written in another way
    if hasattr(value, "nanosecond"):
        return _written(scalar) if value.nanosecond else value.to_pydatetime()
    if hasattr(value, "nanoseconds"):
        return _written(scalar) if value.nanoseconds else value.to_pytimedelta()
    return value


def _written(scalar: Any) -> str | None:
    import pyarrow

    try:
        written: str = scalar.cast(pyarrow.string()).as_py()
    except (pyarrow.ArrowException, ValueError):
        return None
    return written
