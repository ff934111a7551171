"""Documents and bytes of an output by language, kind, level, licence and source, as summary.json has them.

The task that writes an output shard counts it (`write_shard_facts`), so that the summary of thousands of
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
"""Columns of which each value is counted."""
MAX_VALUES = 1_000
"""Values of one column that are named; the rest, those with the fewest bytes, is one value."""
REST = "(others)"
BATCH_ROWS = 4096
Facts = dict[str, Any]
"""`num_documents`, `num_bytes` of text in UTF-8, and `values`: column -> value -> [documents, bytes]; "": no
value."""


def get_facts_path(file: Path) -> Path:
    """Return where the counts of an output shard stand; programs that read a folder of Parquet files pass
    over names that begin so."""
    return file.with_name(f"_{file.stem}.json")


def write_shard_facts(file: Path) -> Facts:
    """Count an output shard and write the counts beside it, NAME.parquet -> _NAME.json.

    Raises:
        UserError: the shard is missing or damaged, or the disk refuses.
    """
    opened = open_sealed_parquet(file, explain_deletion(file))
    names = [name for name in COLUMNS if name in opened.schema_arrow.names]
    facts = merge_facts(map(_batch_facts, opened.iter_batches(BATCH_ROWS, columns=["text", *names])))
    write_sealed_json(get_facts_path(file), facts)
    return facts


def read_output_facts(texts: Path) -> dict[str, Facts]:
    """Return output source -> its facts, in the order of their names.

    Args:
        texts: folder with a folder of shards for each output source.

    Raises:
        UserError: the counts of a shard are missing or damaged.
    """
    return {folder.name: merge_facts(read_sealed_json(file, explain_deletion(file))
                                   for file in sorted(folder.glob("_*.json")))
            for folder in sorted(texts.iterdir())}


def _batch_facts(batch: pa.RecordBatch) -> Facts:
    sizes = pc.binary_length(batch.column("text").cast(pa.large_string())).fill_null(0)
    values: dict[str, dict[str, list[int]]] = {}
    for name in batch.schema.names[1:]:
        column = batch.column(name)
        plain = pc.if_else(column, "true", "false") if pa.types.is_boolean(column.type) else column
        table = pa.table({"value": plain.cast(pa.string()).fill_null(""), "size": sizes})
        grouped = table.group_by("value").aggregate([("size", "count"), ("size", "sum")])
        values[name] = {row["value"]: [row["size_count"], row["size_sum"]] for row in grouped.to_pylist()}
    return {"num_documents": batch.num_rows, "num_bytes": pc.sum(sizes).as_py() or 0, "values": values}


def merge_facts(parts: Iterable[Facts]) -> Facts:
    """Return the sum of facts."""
    total: Facts = {"num_documents": 0, "num_bytes": 0, "values": {}}
    for part in parts:
        total["num_documents"] += part["num_documents"]
        total["num_bytes"] += part["num_bytes"]
        for column, counts in part["values"].items():
            known = total["values"].setdefault(column, {})
            for value, numbers in counts.items():
                known[value] = [a + b for a, b in zip(known.get(value, [0, 0]), numbers, strict=True)]
    total["values"] = {column: _named(counts) for column, counts in sorted(total["values"].items())}
    return total


def _named(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    # The rest stays last when it is added and cut again, so it never passes for a value.
    ranked = sorted(counts, key=lambda value: (value == REST, -counts[value][1], value))
    found = {value: counts[value] for value in sorted(ranked[:MAX_VALUES])}
    if rest := ranked[MAX_VALUES:]:
        old = found.get(REST, [0, 0])
        found[REST] = [old[i] + sum(counts[value][i] for value in rest) for i in (0, 1)]
    return found
