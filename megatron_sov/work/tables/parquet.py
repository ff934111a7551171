"""Write Parquet files atomically, and read untrusted Parquet files within size limits."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from megatron_sov.base.artifacts import create_file, translate_disk_errors
from megatron_sov.base.errors import UserError, first_error_line
from megatron_sov.base.sealed import open_sealed_parquet, seal_file, seal_parquet

MAX_ROWS = 1 << 20
"""Maximum rows per file."""
MAX_BYTES = 4 << 30
"""Maximum memory for a file's columns: a few kilobytes on disk can encode any number of equal values."""
_WIDTHS = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
"""Parquet physical type -> bytes per value."""
_SMALLER_PARTS = "make parts smaller (of rollouts: rollout.piece_prompts)"
REBUILD_HINT = "restore it from a copy, or delete its folder to have it made again"


@contextlib.contextmanager
def report_damage(file: Path, hint: str) -> Iterator[None]:
    """Turn pyarrow's errors about a foreign or damaged file into a `UserError` that ends with hint `hint`."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file}: cannot be read (it is not there); {hint}") from None
    except (pa.ArrowException, OSError, ValueError, IndexError) as e:
        raise UserError(f"{file}: is damaged, or no Parquet file ({first_error_line(e)}); {hint}") from None


def write_table(file: Path, table: pa.Table, dictionary: Sequence[str], split: Sequence[str]) -> None:
    """Write a table to a new file.

    Args:
        file: path to write.
        table: the rows.
        dictionary: leaf columns with repeated values, stored with a dictionary.
        split: float leaf columns, stored with BYTE_STREAM_SPLIT because exponents are similar.
    """
    with open(file, "wb") as f:  # Python's file instead of Arrow's preserves errno
        parquet.write_table(table, f, compression="zstd", use_dictionary=list(dictionary),
                            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
                            write_statistics=False, store_schema=True)


def find_table_problem(table: pa.Table) -> str:
    """Return a sentence if a table exceeds the limits for reading, else ""."""
    return _find_excess(table.num_rows, table.nbytes)


def read_table(file: Path, schema: pa.Schema) -> pa.Table:
    """Read columns of a file; string columns become dictionary arrays with distinct values.

    Args:
        file: path to read.
        schema: columns to read, with required types; the file may have more columns.

    Raises:
        UserError: the file is damaged, too large, not Parquet, or lacks a column.
    """
    texts = [field.name for field in schema if field.type == pa.string()]
    with report_damage(file, REBUILD_HINT):
        # check the footer before reading any column
        with parquet.ParquetFile(file) as plain:
            _check_columns(file, plain, schema)
            with parquet.ParquetFile(file, metadata=plain.metadata, read_dictionary=texts) as opened:
                table = opened.read(schema.names, use_threads=False)
        # offsets and lengths inside the columns are untrusted too
        table.validate(full=True)
    empty = [field.name for field in schema if not field.nullable and table[field.name].null_count]
    if empty:
        raise UserError(f"{file}: column {empty[0]!r} has places without a value; the store did not write it")
    return table


def _check_columns(file: Path, opened: parquet.ParquetFile, schema: pa.Schema) -> None:
    """Raise `UserError` if a file lacks columns or declares more data than the limits."""
    file_schema = opened.schema_arrow
    for field in schema:
        if field.name not in file_schema.names:
            raise UserError(f"{file}: has no column {field.name!r} "
                            f"(columns: {', '.join(file_schema.names)}); the store did not write it")
        if file_schema.field(field.name).type != field.type:
            raise UserError(f"{file}: column {field.name!r} is {file_schema.field(field.name).type}, must be "
                            f"{field.type}; the store did not write it")
    row_groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
    leaves = [group.column(k) for group in row_groups for k in range(group.num_columns)]
    size_bytes = sum(_leaf_bytes(leaf) for leaf in leaves
                     if leaf.path_in_schema.split(".")[0] in schema.names)
    if problem := _find_excess(opened.metadata.num_rows, size_bytes):
        raise UserError(f"{file}: {problem}")
    for leaf in leaves:
        if (leaf.path_in_schema in schema.names and schema.field(leaf.path_in_schema).type != pa.string()
                and leaf.physical_type == "BYTE_ARRAY" and leaf.has_dictionary_page):
            raise UserError(f"{file}: column {leaf.path_in_schema!r} is dictionary-encoded, so a small "
                            "file could expand to any size; the store did not write it")


def _leaf_bytes(leaf: Any) -> int:
    """Return a leaf column's size in memory; dictionary strings count once per distinct value."""
    # numbers take their width regardless of packing; strings and bytes their unpacked size
    width = _WIDTHS.get(leaf.physical_type)
    return int(leaf.total_uncompressed_size if width is None else leaf.num_values * width)


def _find_excess(rows: int, size_bytes: int) -> str:
    if rows > MAX_ROWS:
        return f"has {rows:,} rows, at most {MAX_ROWS:,}; {_SMALLER_PARTS}"
    if size_bytes > MAX_BYTES:
        size_gib, limit_gib = size_bytes / 2**30, MAX_BYTES / 2**30
        return f"takes {size_gib:.1f} GiB in memory, at most {limit_gib:g}; {_SMALLER_PARTS}"
    return ""


def read_strings(column: pa.ChunkedArray) -> list[str | None]:
    """Return a string column as list; equal strings share an object. Raises `ValueError`: invalid UTF-8."""
    texts: list[str | None] = []
    for chunk in column.chunks:
        # one object per distinct string; the appended None stands for missing values
        values = [*chunk.dictionary.to_pylist(), None]
        texts += [values[i] for i in chunk.indices.fill_null(len(values) - 1).to_numpy().tolist()]
    return texts


def read_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the row lists of a column as read-only views."""
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy().tolist()
        # views, because a part may hold millions of tokens
        arrays += [values[start:end] for start, end in itertools.pairwise(ends)]
    return arrays


def build_list_column(values: Sequence[np.ndarray], dtype: Any) -> pa.ListArray:
    """Build a list column from an array per row. Raises `ValueError`: the total is too large for a file."""
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
    if problem := _find_excess(0, int(ends[-1]) * np.dtype(dtype).itemsize):
        raise ValueError(problem)
    flat = (np.concatenate(values, dtype=dtype, casting="unsafe") if len(values) else np.zeros(0, dtype))
    field = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(flat), type=pa.list_(field))


class TableFile:
    """A Parquet file under construction: `with TableFile(path, schema) as file: file.write(...)`.

    The file appears under its name when complete, sealed with a checksum and synced to disk.
    """

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self.path, self.columns = path, columns
        self._new = create_file(path, create_parents=True)

    def __enter__(self) -> Self:
        self._temporary = self._new.__enter__()
        with translate_disk_errors(self.path):
            self._writer = parquet.ParquetWriter(self._temporary, self.columns, compression="zstd")
        return self

    def write(self, columns: dict[str, list[Any]]) -> None:
        """Write a row group. Raises `UserError`: the disk is full. pa.ArrowInvalid, pa.ArrowTypeError: a
        value does not fit its column's type."""
        table = pa.table([pa.array(columns[f.name], f.type) for f in self.columns], self.columns)
        if table.num_rows:
            with translate_disk_errors(self.path):
                self._writer.write_table(table, row_group_size=table.num_rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._new.__exit__(kind, error, trace)
            return
        with contextlib.ExitStack() as stack:
            # sealed before the rename, hence when it appears
            stack.push(self._new)
            with translate_disk_errors(self.path):
                seal_parquet(self._writer)
                self._writer.close()
                seal_file(self._temporary)


def iter_row_groups(files: Sequence[Path], hint: Callable[[Path], str]) -> Iterator[list[pa.Table]]:
    """Yield row groups of a file, each with the corresponding row groups of files with added columns.

    Args:
        files: `TableFile` paths: the first file, then files with further columns for the same rows.
        hint: returns the hint for a damaged file.

    Raises:
        UserError: a file is missing, damaged, or has another number of rows.
    """
    opened = []
    for file in files:
        with report_damage(file, hint(file)):
            opened.append(open_sealed_parquet(file, hint(file), is_required=True))
    for i in range(opened[0].num_row_groups):
        group: list[pa.Table] = []
        for file, parquet_file in zip(files, opened, strict=True):
            with report_damage(file, hint(file)):
                group.append(parquet_file.read_row_group(i, use_threads=False))
            if group[-1].num_rows != group[0].num_rows:
                raise UserError(f"{file}: has {group[-1].num_rows} rows where {files[0]} has "
                                f"{group[0].num_rows}; {hint(file)}")
        yield group
