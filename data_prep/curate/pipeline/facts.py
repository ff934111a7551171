"""Count an output's documents and bytes by language, kind, level, licence and source, for `summary.json`.

Tasks count output shards as soon as they are written (`write_shard_facts`): the summary of thousands of
shards reads small files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.damaged_files import explain_deletion
from megatron_sov.base.sealed import open_sealed_parquet, read_sealed_json, write_sealed_json

COLUMNS = ("source", "language", "form", "kind", "level", "licence", "synthetic")
"""Columns to count by value."""
MAX_VALUES = 1_000
"""Values counted separately for each column. `REST` sums the values with the fewest bytes."""
REST = "(others)"
BATCH_ROWS = 4096
Facts = dict[str, Any]
"""`num_documents`, `num_bytes` (UTF-8), `values`: column -> value ("": null) -> [documents, bytes]."""


def get_facts_path(file: Path) -> Path:
    """Return the path for the facts of a shard; dataset readers skip names that begin with "_"."""
    return file.with_name(f"_{file.stem}.json")


def write_shard_facts(file: Path) -> Facts:
    """Count an output shard NAME.parquet and write the counts to _NAME.json. Raises `UserError`: the shard is
    missing or damaged, or writing fails."""
    shard = open_sealed_parquet(file, explain_deletion(file))
    names = [name for name in COLUMNS if name in shard.schema_arrow.names]
    facts = merge_facts(map(_count_batch, shard.iter_batches(BATCH_ROWS, columns=["text", *names])))
    write_sealed_json(get_facts_path(file), facts)
    return facts


def read_output_facts(texts: Path) -> dict[str, Facts]:
    """Return output name -> facts, sorted by name.

    Args:
        texts: folder with a folder for each output name.

    Raises:
        UserError: the facts file of a shard is missing or damaged.
    """
    return {folder.name: merge_facts(read_sealed_json(file, explain_deletion(file))
                                     for file in sorted(folder.glob("_*.json")))
            for folder in sorted(texts.iterdir())}


def merge_facts(parts: Iterable[Facts]) -> Facts:
    total: Facts = {"num_documents": 0, "num_bytes": 0, "values": {}}
    for part in parts:
        total["num_documents"] += part["num_documents"]
        total["num_bytes"] += part["num_bytes"]
        for column, counts in part["values"].items():
            sums = total["values"].setdefault(column, {})
            for value, (documents, num_bytes) in counts.items():
                previous = sums.get(value, [0, 0])
                sums[value] = [previous[0] + documents, previous[1] + num_bytes]
    total["values"] = {column: _limit_values(counts) for column, counts in sorted(total["values"].items())}
    return total


def _count_batch(batch: pa.RecordBatch) -> Facts:
    sizes = pc.binary_length(batch.column("text").cast(pa.large_string())).fill_null(0)
    values: dict[str, dict[str, list[int]]] = {}
    for name in batch.schema.names[1:]:
        column = batch.column(name)
        if pa.types.is_boolean(column.type):
            column = pc.if_else(column, "true", "false")
        table = pa.table({"value": column.cast(pa.string()).fill_null(""), "size": sizes})
        groups = table.group_by("value").aggregate([("size", "count"), ("size", "sum")])
        values[name] = {row["value"]: [row["size_count"], row["size_sum"]] for row in groups.to_pylist()}
    return {"num_documents": batch.num_rows, "num_bytes": pc.sum(sizes).as_py() or 0, "values": values}


def _limit_values(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    # REST stays last, so a later merge never takes it for a value.
    ranked = sorted(counts, key=lambda value: (value == REST, -counts[value][1], value))
    limited = {value: counts[value] for value in sorted(ranked[:MAX_VALUES])}
    if rest := ranked[MAX_VALUES:]:
        previous = limited.get(REST, [0, 0])
        limited[REST] = [previous[i] + sum(counts[value][i] for value in rest) for i in (0, 1)]
    return limited
