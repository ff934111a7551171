"""Layer files over a base file give the same documents as applying each step in memory."""

import random
from pathlib import Path

import pytest

from data_prep.curate.pipeline.step import StepOutcome
from data_prep.curate.pipeline.tasks import BASE_SCHEMA, LayerFile, LayerRow, TableFile, iter_row_batches
from megatron_sov.base.errors import UserError


def write_base(file: Path, sizes: list[int]) -> list[LayerRow]:
    """Write a base file with row groups of these sizes, and return all rows."""
    rows = []
    with TableFile(file, BASE_SCHEMA) as base:
        for size in sizes:
            group = [LayerRow(f"s:0:{i}", f"text {i}", {"kind": "en"})
                     for i in range(len(rows), len(rows) + size)]
            base.write({name: [{"id": row.id, "text": row.text, "kind": "en"}.get(name) for row in group]
                        for name in BASE_SCHEMA.names})
            rows += group
    return rows


def get_values(row: LayerRow | None) -> tuple[object, ...] | None:
    return row and (row.id, row.text, row.columns.get("score"), row.columns["kind"])


def test_layers_agree_with_documents_in_memory(tmp_path: Path) -> None:
    """Four layers of random outcomes; a document that a layer drops is None in later layers."""
    rng = random.Random(0)
    sizes = [3, 1, 5]
    rows: list[LayerRow | None] = list(write_base(tmp_path / "base.parquet", sizes))
    files = [tmp_path / "base.parquet"]
    for number in range(4):
        files.append(tmp_path / f"{number}.parquet")
        with LayerFile(files[-1], {"score": "float32", "kind": "string"}) as layer:
            start = 0
            for size in sizes:
                outcomes: list[StepOutcome | None] = []
                for i in range(start, start + size):
                    row = rows[i]
                    if row is None:
                        outcomes.append(None)
                        continue
                    score = float(rng.randrange(10)) if rng.random() < 0.7 else None
                    text = f"{row.text}+{number}" if rng.random() < 0.3 else None
                    reason = "no" if rng.random() < 0.2 else ""
                    outcomes.append(StepOutcome(reason, text, {} if score is None else {"score": score}))
                    columns = row.columns if score is None else {**row.columns, "score": score}
                    rows[i] = None if reason else LayerRow(row.id, text or row.text, columns)
                layer.write_outcomes(outcomes)
                start += size
        stored = [row for batch in iter_row_batches("s", files) for row in batch]
        assert list(map(get_values, stored)) == list(map(get_values, rows))
    assert None in rows and any(rows)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), TableFile(tmp_path / "a.parquet", BASE_SCHEMA) as file:
        file.write({name: [] for name in BASE_SCHEMA.names})
        assert not (tmp_path / "a.parquet").exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_of_another_shard_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base.parquet", [3])
    with LayerFile(tmp_path / "layer.parquet", {}) as layer:
        layer.write_outcomes([StepOutcome()] * 2)
    with pytest.raises(UserError, match=r"has 2 rows where .* has 3; delete it under all"):
        list(iter_row_batches("s", [tmp_path / "base.parquet", tmp_path / "layer.parquet"]))
