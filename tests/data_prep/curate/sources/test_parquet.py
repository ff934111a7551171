"""Parquet: rows as documents."""

import datetime
import io
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.curate.sources.parquet import _get_start
from data_prep.curate.sources.source import RawDocument

TABLE = pa.table({"text": ["one", "", "셋"], "url": ["http://a.example", None, None],
                  "date": [datetime.date(2026, 1, 2)] * 3})


def build_parquet(table: pa.Table = TABLE, row_group_size: int = 2) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue()


def test_rows_of_parquet(read) -> None:
    first, empty, last = read({"a.parquet": build_parquet()})
    assert first == RawDocument("one", "a.parquet:0.1", {"url": "http://a.example", "date": "2026-01-02"})
    assert (empty.code, empty.is_left_out) == ("empty", True)
    assert (last.text, last.place) == ("셋", "a.parquet:1.1")


def test_each_row_group_is_in_one_part(read, monkeypatch) -> None:
    table = pa.table({"text": [f"row {n}" for n in range(100)]})
    monkeypatch.setattr("data_prep.curate.sources.parquet._PART_BYTES", 1000)
    records = read({"a.parquet": build_parquet(table, 7)})
    assert [one.text for one in records] == [f"row {n}" for n in range(100)]
    assert len({one.place for one in records}) == 100


@pytest.mark.parametrize("content", [build_parquet()[:150], b"PAR1" * 40])
def test_a_truncated_file_is_reported(read, content: bytes) -> None:
    records = read({"a.parquet": content, "b.txt": "read"})
    assert [one.code for one in records if not isinstance(one, RawDocument)] == ["parquet"]


def test_another_column_can_hold_the_text(read) -> None:
    content = build_parquet(pa.table({"body": ["x"]}))
    records = read({"a.parquet": content}, "parquet", text_field="body")
    assert [one.text for one in records] == ["x"]
    broken = read({"a.parquet": content}, "parquet")[0]
    assert "body" in broken.reason and "text_field" in broken.reason


def test_a_value_that_python_cannot_represent_does_not_drop_its_row(read) -> None:
    table = pa.table({"text": ["a", "b", "c"],
                      "timestamp": pa.array([1, 10**18 + 1, None], pa.timestamp("ns")),
                      "late": pa.array([10**18, 0, 1], pa.timestamp("us")),
                      "zone": pa.array([0, 0, 0], pa.timestamp("us", "No/Where")),
                      "took": pa.array([1, 2, 3], pa.duration("ns"))})
    records = read({"a.parquet": build_parquet(table, 3)})
    assert [one.text for one in records] == ["a", "b", "c"]
    assert records[1].columns["date"] == "2001-09-09 01:46:40.000000001"


@pytest.mark.parametrize(("dictionary", "data", "begin"), [
    (4, 60, 4), (None, 60, 60), (0, 60, 60), (None, 10**9, 0), (-5, 60, 0), (None, None, 0)])
def test_every_row_group_begins_somewhere_in_its_file(dictionary, data, begin: int) -> None:
    """It begins at its dictionary or data page; offsets outside the file of 1000 bytes count as 0."""
    column = SimpleNamespace(dictionary_page_offset=dictionary, data_page_offset=data)
    assert _get_start(SimpleNamespace(column=lambda number: column), 1000) == begin
