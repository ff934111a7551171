"""Files of documents: a base with their texts, and over it a layer for each step, row by row.

All files of a shard have the same groups of rows, which are held in memory one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.curate.pipeline.step import SOURCE_COLUMNS, ColumnType, StepOutcome, schema
from data_prep.shards.shard_damage import way_out
from megatron_sov.work.tables.parquet import TableFile, read_groups

GROUP_BYTES, GROUP_ROWS = 8 << 20, 1000
"""A group of rows is closed when its text, or its rows, have become so many."""
BASE_FIRST = (("id", pa.string()), ("text", pa.string()))
LAYER_FIRST = (("reason", pa.string()), ("text", pa.string()))
BASE_SCHEMA = schema({name: kind for name, kind in SOURCE_COLUMNS.items() if name != "source"}, *BASE_FIRST)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A document as the layers so far leave it."""

    id: str
    text: str
    columns: dict[str, Any]


def groups(source: str, files: Sequence[Path], seals: Sequence[str] = ()) -> Iterator[list[LayerRow | None]]:
    """Yield the groups of rows of a shard: documents as they are behind the last layer, None where one is
    dropped.

    Args:
        source: name of their source.
        files: the base and its layers, in order.
        seals: checksum of each as the counts beside it say it (`noted_seal`); (): nothing says it.

    Raises:
        UserError: a file is missing, damaged, or of another shard.
    """
    yield from (_rows(source, tables) for tables in read_groups(files, seals or [None] * len(files), way_out))


def _rows(source: str, tables: list[pa.Table]) -> list[LayerRow | None]:
    base = tables[0]
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
    return [LayerRow(identifier, text, dict(zip(names, values, strict=True))) if a else None
            for a, identifier, text, *values in zip(alive, base.column("id").to_pylist(), texts,
                                                    *columns.values(), strict=True)]


class LayerFile(TableFile):
    """A step's layer over a shard."""

    def __init__(self, path: Path, adds: dict[str, ColumnType]) -> None:
        super().__init__(path, schema(adds, *LAYER_FIRST))
        self.adds = adds

    def write_outcomes(self, outcomes: Sequence[StepOutcome | None]) -> None:
        """Write what became of a group's rows; None for those that were dropped before."""
        made: dict[str, list[Any]] = {
            "reason": [None if o is None else o.reason for o in outcomes],
            "text": [None if o is None else o.text for o in outcomes]}
        for name in self.adds:
            made[name] = [None if o is None else o.values.get(name) for o in outcomes]
        self.write(made)
