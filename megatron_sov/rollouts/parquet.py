"""Parquet files that strangers may have written: read within bounds, or refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from megatron_sov.errors import UserError, first_line

MAX_ROWS = 1 << 20
"""Of one file."""
MAX_BYTES = 4 << 30
"""Of one file's columns in memory: a few kilobytes on the disk can stand for any number of equal values."""
_WIDTHS = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
"""Physical type -> bytes of a value."""


def write_table(file: Path, table: pa.Table, dictionary: Sequence[str], split: Sequence[str]) -> None:
    """Write a table as a new file.

    Args:
        file: to write.
        table: its rows.
        dictionary: leaves whose values repeat, each of which is written once.
        split: leaves of floats, whose bytes are sorted by their place, since exponents are much alike.
    """
    with open(file, "wb") as f:  # ours and not Arrow's: what the disk refuses keeps its number
        parquet.write_table(table, f, compression="zstd", use_dictionary=list(dictionary),
                            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
                            write_statistics=False, store_schema=True)


def table_problem(table: pa.Table) -> str:
    """Return a sentence where a table is larger than what is read again, else an empty text."""
    return _too_large(table.num_rows, table.nbytes)


def read_table(file: Path, schema: pa.Schema) -> pa.Table:
    """Return the rows of a file; its texts are dictionaries, which hold each value once.

    Args:
        file: to read.
        schema: columns to read, and the types that they must have; the file may have more.

    Raises:
        UserError: it is no Parquet file, a damaged one, lacks a column, or is too large.
    """
    texts = [field.name for field in schema if field.type == pa.string()]
    try:
        with parquet.ParquetFile(file) as plain:
            _check(file, plain, schema)
            with parquet.ParquetFile(file, metadata=plain.metadata, read_dictionary=texts) as opened:
                table = opened.read(schema.names, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as e:
        first = first_line(e)
        raise UserError(f"{file}: is damaged, or no Parquet file ({first}); restore it from a copy, or "
                        "delete its folder to have it made again") from None
    empty = [field.name for field in schema if not field.nullable and table[field.name].null_count]
    if empty:
        raise UserError(f"{file}: column {empty[0]!r} has places without a value; the store did not write it")
    return table


def _check(file: Path, opened: parquet.ParquetFile, schema: pa.Schema) -> None:
    """Raise `UserError` where a file has other columns, or more in them than may be read."""
    found = opened.schema_arrow
    for field in schema:
        if field.name not in found.names:
            raise UserError(f"{file}: has no column {field.name!r} (columns: {', '.join(found.names)}); the "
                            "store did not write it")
        if found.field(field.name).type != field.type:
            raise UserError(f"{file}: column {field.name!r} is {found.field(field.name).type}, must be "
                            f"{field.type}; the store did not write it")
    size_bytes = sum(_bytes_of(leaf) for leaf in _leaves(opened.metadata)
                     if leaf.path_in_schema.split(".")[0] in schema.names)
    if problem := _too_large(opened.metadata.num_rows, size_bytes):
        raise UserError(f"{file}: {problem}")
    for leaf in _leaves(opened.metadata):
        if (leaf.path_in_schema in schema.names and schema.field(leaf.path_in_schema).type != pa.string()
                and leaf.physical_type == "BYTE_ARRAY" and leaf.has_dictionary_page):
            raise UserError(f"{file}: column {leaf.path_in_schema!r} repeats its values by a dictionary, in "
                            "which little stands for much; the store did not write it")


def _leaves(metadata: Any) -> Iterator[Any]:
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        yield from (group.column(k) for k in range(group.num_columns))


def _bytes_of(leaf: Any) -> int:
    """Return what a column of a row group takes in memory, texts once for each that differs."""
    width = _WIDTHS.get(leaf.physical_type)
    return int(leaf.total_uncompressed_size if width is None else leaf.num_values * width)


def _too_large(rows: int, size_bytes: int) -> str:
    if rows > MAX_ROWS:
        return f"has {rows:,} rows, at most {MAX_ROWS:,}; make pieces smaller (rollout.piece_prompts)"
    if size_bytes > MAX_BYTES:
        return (f"takes {size_bytes / 2**30:.1f} GiB in memory, at most {MAX_BYTES / 2**30:g}; make pieces "
                "smaller (rollout.piece_prompts)")
    return ""


def texts_of(column: pa.ChunkedArray) -> list[str | None]:
    """Return the texts of a column; equal ones of it are one object.

    Raises:
        ValueError: one is no UTF-8.
    """
    found: list[str | None] = []
    for chunk in column.chunks:
        values = [*chunk.dictionary.to_pylist(), None]
        found += [values[i] for i in chunk.indices.fill_null(len(values) - 1).to_numpy().tolist()]
    return found


def arrays_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the list of each row as a view that nobody may write to."""
    found: list[np.ndarray] = []
    for chunk in column.chunks:
        values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy().tolist()
        found += [values[start:end] for start, end in itertools.pairwise(ends)]
    return found


def lists(values: Sequence[np.ndarray], dtype: Any) -> pa.ListArray:
    """Return a column with an array in each row.

    Raises:
        ValueError: all together are more than one file may hold.
    """
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
    if problem := _too_large(0, int(ends[-1]) * np.dtype(dtype).itemsize):
        raise ValueError(problem)
    flat = (np.concatenate(values, dtype=dtype, casting="unsafe") if len(values) else np.zeros(0, dtype))
    field = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(flat), type=pa.list_(field))
