"""Counts of documents, and their sums over parts."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.curate.pipeline import facts
from data_prep.curate.pipeline.counts import MAX_SAMPLES, DocumentCounts, hash_sample_id
from data_prep.curate.pipeline.facts import merge_facts, read_output_facts, write_shard_facts


def write(folder: Path, num_shards: int) -> list[dict[str, object]]:
    """Write documents as shards, each with its counts."""
    draw = random.Random(0)
    rows = [{"text": draw.choice(["", "말 ", "word "]) * draw.randrange(9),
             "language": draw.choice(["en", "ko", None]), "synthetic": draw.random() < 0.5}
            for _ in range(120)]
    schema = pa.schema([("text", pa.string()), ("language", pa.string()), ("synthetic", pa.bool_())])
    folder.mkdir(parents=True)
    for number in range(num_shards):
        file = folder / f"{number:05}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[number::num_shards], schema), file)
        write_shard_facts(file)
    return rows


def test_counts_are_those_of_a_plain_loop_however_shards_are_cut(tmp_path: Path) -> None:
    rows = write(tmp_path / "one/all", 1)
    write(tmp_path / "four/all", 4)
    found = read_output_facts(tmp_path / "one")
    assert found == read_output_facts(tmp_path / "four")
    values: dict[str, dict[str, list[int]]] = {"language": {}, "synthetic": {}}
    for row in rows:
        size = len(str(row["text"]).encode())
        names = {"language": str(row["language"] or ""), "synthetic": str(row["synthetic"]).lower()}
        for column, name in names.items():
            old = values[column].setdefault(name, [0, 0])
            values[column][name] = [old[0] + 1, old[1] + size]
    assert found["all"] == {"num_documents": 120, "values": values,
                            "num_bytes": sum(len(str(row["text"]).encode()) for row in rows)}


def test_of_very_many_values_the_largest_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MAX_VALUES", 2)
    part = {"num_documents": 8, "num_bytes": 65,
            "values": {"topic": {"a": [1, 10], "b": [1, 30], "c": [2, 20], "d": [4, 5]}}}
    once = merge_facts([part])
    assert once["values"]["topic"] == {"b": [1, 30], "c": [2, 20], "(others)": [5, 15]}
    assert merge_facts([once, once])["values"]["topic"] == {"b": [2, 60], "c": [4, 40], "(others)": [10, 30]}


def counted(identifiers: list[int]) -> DocumentCounts:
    counts = DocumentCounts()
    for i in identifiers:
        counts.add_document(f"d{i}", "three" if i % 3 == 0 else "", "é" * i, "x" if i % 3 == 1 else None)
    return counts


def test_counts_of_parts_are_the_counts_of_the_whole() -> None:
    whole = counted(list(range(1, 100)))
    parts = DocumentCounts.merge_dicts(counted(list(range(start, 100, 4))).to_dict()
                                       for start in (3, 1, 4, 2))
    assert parts.to_dict() == whole.to_dict()
    assert (whole.documents_in, whole.documents_kept, whole.documents_changed) == (99, 66, 33)
    assert whole.bytes_in == sum(2 * i for i in range(1, 100))
    assert whole.bytes_kept == 33 + sum(2 * i for i in range(2, 100, 3))
    assert whole.dropped == {"three": {"documents": 33, "bytes": sum(2 * i for i in range(3, 100, 3))}}


def test_samples_are_those_whose_identifiers_hash_lowest() -> None:
    dropped = [{"id": f"d{i}", "reason": "three", "before": "é" * i} for i in range(3, 100, 3)]
    lowest = sorted(dropped, key=hash_sample_id)[:MAX_SAMPLES]
    assert counted(list(range(1, 100))).samples == {"dropped": lowest}
