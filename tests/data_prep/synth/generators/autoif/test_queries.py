"""Prompts of users, in the forms that they come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.synth.generators.autoif.answers import queries_of, query_in
from megatron_sov.base.errors import UserError

TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "first"},
         {"role": "assistant", "content": "a"}, {"role": "user", "content": "second"}]


@pytest.mark.parametrize("record", [
    {"conversation": TURNS}, {"messages": TURNS}, {"prompt": TURNS}, {"prompt": "first"}, {"query": "first"},
    {"conversations": [{"from": "human", "value": "first"}]}, {"messages": [], "instruction": "first"}])
def test_the_first_turn_of_the_user(record: dict[str, Any]) -> None:
    assert query_in(record, "x:1") == "first"


@pytest.mark.parametrize("record", [
    {}, {"text": "first"}, {"messages": [{"role": "assistant", "content": "a"}]}, {"prompt": 3},
    {"messages": "first"}, {"conversation": [3, None]}])
def test_a_record_without_one_is_refused_with_its_place(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="x:1: has no prompt of a user"):
        query_in(record, "x:1")


def test_a_table_of_wildchat_reads_as_its_lines(tmp_path: Path) -> None:
    rows = [{"conversation": [{"role": "user", "content": f"물음 {i}"}], "toxic": i % 3 == 0,
             "license": "odc-by", "hashed_ip": "x"} for i in range(9)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = list(queries_of([tmp_path / "a.parquet"], 1, 100, False))
    lines = list(queries_of([tmp_path / "b.jsonl"], 1, 100, False))
    assert [(q.text, q.digest, q.licence) for q in table] == [(q.text, q.digest, q.licence) for q in lines]
    assert [q.text for q in lines] == [f"물음 {i}" for i in (1, 2, 4, 5, 7, 8)]
    assert len(list(queries_of([tmp_path], 1, 100, True))) == 9  # each once, though it stands in both
    assert list(queries_of([tmp_path], 5, 100, True)) == []
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(queries_of([tmp_path], 1, 100, True))
