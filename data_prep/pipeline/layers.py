"""Files of documents: a base with their texts, and over it a layer for each step, row by row.

All files of a shard have the same groups of rows, which are held in memory one at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pipeline.step import SOURCE_COLUMNS, ColumnType, Outcome, schema
from data_prep.shard_damage import way_out
from megatron_sov.artifacts import disk_errors, fsync_path, new_file
from megatron_sov.errors import UserError
from megatron_sov.sealed import open_parquet, seal_file, seal_parquet

GROUP_BYTES, GROUP_ROWS = 8 << 20, 1000
"""A group of rows is closed when its text, or its rows, have become so many."""
BASE_FIRST = (("id", pa.string()), ("text", pa.string()))
LAYER_FIRST = (("reason", pa.string()), ("text", pa.string()))
BASE_SCHEMA = schema({name: kind for name, kind in SOURCE_COLUMNS.items() if name != "source"}, *BASE_FIRST)


@dataclass(frozen=True, slots=True)
class Row:
    """A document as the layers so far leave it."""

    id: str
    text: str
    columns: dict[str, Any]


class TableFile:
    """A Parquet file under construction: `with TableFile(path, schema) as file: file.write(...)`; it appears
    under its name when it is complete, with a checksum of its own, and on the disk."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self.path, self.columns = path, columns
        self._seal, self._new = "", new_file(path)

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self._new.__enter__()
            self._writer = pq.ParquetWriter(self._temporary, self.columns, compression="zstd")
        return self

    def write(self, columns: dict[str, list[Any]]) -> None:
        """Write one group of rows.

        Raises:
            UserError: the disk is full.
            pa.ArrowInvalid, pa.ArrowTypeError: a value is not of its column's type.
        """
        table = pa.table([pa.array(columns[f.name], f.type) for f in self.columns], self.columns)
        if table.num_rows:
            with disk_errors(self.path):
                self._writer.write_table(table, row_group_size=table.num_rows)

    def close(self) -> str:
        """Bring all of it to the disk, still under its temporary name; returns its checksum."""
        if not self._seal:
            with disk_errors(self.path):
                seal_parquet(self._writer)
                self._writer.close()
                self._seal = seal_file(self._temporary)
                fsync_path(self._temporary)
        return self._seal

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._new.__exit__(kind, error, trace)
            return
        with contextlib.ExitStack() as stack:
            stack.push(self._new)
            self.close()


def groups(source: str, files: Sequence[Path], seals: Sequence[str] = ()) -> Iterator[list[Row | None]]:
    """Yield the groups of rows of a shard: documents as they are behind the last layer, None where one is
    dropped.

    Args:
        source: name of their source.
        files: the base and its layers, in order.
        seals: checksum of each as the counts beside it say it (`noted_seal`); (): nothing says it.

    Raises:
        UserError: a file is missing, damaged, or of another shard.
    """
    noted: Sequence[str | None] = seals or [None] * len(files)
    opened = [_opened(file, seal) for file, seal in zip(files, noted, strict=True)]
    for i in range(opened[0].num_row_groups):
        yield _group(source, [_read(file, parquet, i) for file, parquet in zip(files, opened, strict=True)],
                     files)


def _opened(file: Path, seal: str | None) -> pq.ParquetFile:
    try:
        return open_parquet(file, way_out(file), is_required=True, seal=seal)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]}); "
                        f"{way_out(file)}") from None


def _read(file: Path, parquet: pq.ParquetFile, group: int) -> pa.Table:
    try:
        return parquet.read_row_group(group, use_threads=False)
    except (OSError, pa.ArrowException, IndexError) as e:
        raise UserError(f"{file}: is damaged ({' '.join(str(e).split())[:200]}); "
                        f"{way_out(file)}") from None


def _group(source: str, tables: list[pa.Table], files: Sequence[Path]) -> list[Row | None]:
    base = tables[0]
    for table, file in zip(tables, files, strict=True):
        if table.num_rows != base.num_rows:
            raise UserError(f"{file}: has {table.num_rows} rows where {files[0]} has {base.num_rows}; "
                            f"{way_out(file)}")
    alive = [True] * base.num_rows
    texts: list[str] = base.column("text").to_pylist()
    columns = {name: base.column(name).to_pylist() for name in base.column_names[2:]}
    columns["source"] = [source] * base.num_rows
    for table in tables[1:]:
        reasons = table.column("reason").to_pylist()
        alive = [a and reason == "" for a, reason in zip(alive, reasons, strict=True)]
        if table.column("text").null_count < table.num_rows:
            texts = [before if text is None else text
                     for before, text in zip(texts, table.column("text").to_pylist(), strict=True)]
        for name in table.column_names[2:]:
            new = table.column(name).to_pylist()
            old = columns.get(name)
            # a document that the step passed over keeps what it has
            columns[name] = (new if old is None else
                             [o if n is None else n for o, n in zip(old, new, strict=True)])
    names = list(columns)
    return [Row(identifier, text, dict(zip(names, values, strict=True))) if a else None
            for a, identifier, text, *values in zip(alive, base.column("id").to_pylist(), texts,
                                                    *columns.values(), strict=True)]


class LayerFile(TableFile):
    """A step's layer over a shard."""

    def __init__(self, path: Path, adds: dict[str, ColumnType]) -> None:
        super().__init__(path, schema(adds, *LAYER_FIRST))
        self.adds = adds

    def write_outcomes(self, outcomes: Sequence[Outcome | None]) -> None:
        """Write what became of a group's rows; None for those that were dropped before."""
        made: dict[str, list[Any]] = {
            "reason": [None if o is None else o.reason for o in outcomes],
            "text": [None if o is None else o.text for o in outcomes]}
        for name in self.adds:
            made[name] = [None if o is None else o.values.get(name) for o in outcomes]
        self.write(made)
