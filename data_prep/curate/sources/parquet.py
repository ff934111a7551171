"""Reader for Parquet files: each row is a document."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow

from data_prep.curate.sources.lines import build_document
from data_prep.curate.sources.reader import EMPTY, FileReader, ReadingJob, SourceItem
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourcePiece
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.arrow_rows import iter_parquet_batches
from megatron_sov.base.documents.files import open_parquet

_PART_BYTES = 64 << 20


class ParquetReader(FileReader):
    format = "parquet"
    suffixes = frozenset([".parquet"])
    compressed = False

    def split_file(self, name: str) -> Iterator[SourcePiece]:
        """Yield parts of 64 MiB without opening the file; a row group belongs to the part where it begins."""
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
                      if job.piece.start <= _get_start(metadata.row_group(n), size_bytes) < job.piece.stop]
        except BadRecord as e:
            # Only the first part reports a damaged file.
            broken = [job.build_broken(e)] if job.piece.start == 0 else []
            yield SourceItem(job.name, lambda: iter(broken))
            return
        for number in groups:
            yield SourceItem(f"{job.name}:{number}", partial(_read_row_group, job, number))


def _get_start(group: Any, size_bytes: int) -> int:
    """Return the offset of a row group's first page; invalid offsets become 0, inside the first part."""
    column = group.column(0)
    offset: int = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)
    return offset if 0 <= offset < size_bytes else 0


def _read_row_group(job: ReadingJob, number: int) -> Iterator[RawDocument | BrokenRecord]:
    # Counted over batches: places do not depend on the batch size.
    row = 0
    for batch in iter_parquet_batches(open_parquet(job.file), range(number, number + 1), use_threads=False):
        for i in range(batch.num_rows):
            row += 1
            place = f"{job.name}:{number}.{row}"
            try:
                record = {name: _convert_value(column[i])
                          for name, column in zip(batch.schema.names, batch.columns, strict=True)}
                yield build_document(record, place, job)
            except BadRecord as e:
                yield job.build_broken(e, place, is_left_out=e.code == EMPTY)


def _convert_value(scalar: Any) -> Any:
    """Return a Python value, or a string for values without a Python type: nanoseconds, years after 9999,
    unknown time zones."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 ({e.reason} at byte {e.start} of a column)") from None
    except (ValueError, OverflowError, LookupError):
        return _format_value(scalar)
    # With pandas installed, nanoseconds have pandas types, which JSON would format in another way.
    if hasattr(value, "nanosecond"):
        return _format_value(scalar) if value.nanosecond else value.to_pydatetime()
    if hasattr(value, "nanoseconds"):
        return _format_value(scalar) if value.nanoseconds else value.to_pytimedelta()
    return value


def _format_value(scalar: Any) -> str | None:
    try:
        text: str = scalar.cast(pyarrow.string()).as_py()
    except (pyarrow.ArrowException, ValueError):
        return None
    return text
