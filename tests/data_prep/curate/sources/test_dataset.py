"""Parquet, Arrow and datasets: rows as documents."""

from __future__ import annotations

import datetime
import io
import json
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from data_prep.curate.sources.dataset import _begin
from data_prep.curate.sources.source import Raw
from megatron_sov.base.errors import UserError

TABLE = pa.table({"text": ["one", "", "셋"], "url": ["http://a.example", None, None],
                  "date": [datetime.date(2026, 1, 2)] * 3})


def parquet_bytes(table: pa.Table = TABLE, row_group_size: int = 2) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue()


def arrow_bytes(open_writer) -> bytes:
    sink = io.BytesIO()
    with open_writer(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


def test_rows_of_parquet(read) -> None:
    first, empty, last = read({"a.parquet": parquet_bytes()})
    assert first == Raw("one", "a.parquet:0.1", {"url": "http://a.example", "date": "2026-01-02"})
    assert (empty.code, empty.is_left_out) == ("empty", True)
    assert (last.text, last.place) == ("셋", "a.parquet:1.1")


def test_each_row_group_is_in_one_part(read, monkeypatch) -> None:
    table = pa.table({"text": [f"row {n}" for n in range(100)]})
    monkeypatch.setattr("data_prep.curate.sources.dataset._PART_BYTES", 1000)
    found = read({"a.parquet": parquet_bytes(table, 7)})
    assert [one.text for one in found] == [f"row {n}" for n in range(100)]
    assert len({one.place for one in found}) == 100


@pytest.mark.parametrize("open_writer", [ipc.new_file, ipc.new_stream])
def test_rows_of_arrow_as_files_and_as_streams(read, open_writer) -> None:
    assert [one.text for one in read({"a.arrow": arrow_bytes(open_writer)}) if isinstance(one, Raw)] == [
        "one", "셋"]


@pytest.mark.parametrize(("name", "content"), [
    ("a.parquet", parquet_bytes()[:150]), ("a.parquet", b"PAR1" * 40), ("a.arrow", b"ARROW1" + bytes(100)),
    ("a.arrow", arrow_bytes(ipc.new_file)[:200])])
def test_half_a_file_is_told(read, name: str, content: bytes) -> None:
    assert [one.code for one in read({name: content, "b.txt": "read"}) if not isinstance(one, Raw)] == [
        name.partition(".")[2]]


def test_another_column_can_hold_the_text(read) -> None:
    found = read({"a.parquet": parquet_bytes(pa.table({"body": ["x"]}))}, "parquet", text_field="body")
    assert [one.text for one in found] == ["x"]
    told = read({"a.parquet": parquet_bytes(pa.table({"body": ["x"]}))}, "parquet")[0]
    assert "body" in told.reason and "text_field" in told.reason


CARD = "---\nlicense: cc-by-4.0\nlanguage:\n- ko\n---\n# A dataset\n"


def test_a_dataset_has_the_licence_and_language_of_its_card(read) -> None:
    files = {"README.md": CARD, "data/train-00000-of-00001.parquet": parquet_bytes(),
             "data/test-00000-of-00001.parquet": parquet_bytes(pa.table({"text": ["held out"]}))}
    found = [one for one in read(files, "dataset") if isinstance(one, Raw)]
    assert [one.text for one in found] == ["one", "셋"]
    assert found[0].columns["licence"] == "cc-by-4.0" and found[0].columns["language_hint"] == "ko"


def test_what_save_to_disk_writes_is_a_dataset(read) -> None:
    files = {"train/data-00000-of-00001.arrow": arrow_bytes(ipc.new_stream), "train/state.json": "{}",
             "train/cache-0123456789abcdef.arrow": arrow_bytes(ipc.new_stream), "dataset_info.json": "{}",
             "test/data-00000-of-00001.arrow": arrow_bytes(ipc.new_stream)}
    found = read(files, "dataset")
    assert [one.place for one in found if isinstance(one, Raw)] == [
        "train/data-00000-of-00001.arrow:1", "train/data-00000-of-00001.arrow:3"]


@pytest.mark.parametrize("card", ["---\n- a list\n---\n", "---\n: : :\n---\n", "no head",
                                  f"---\nlicense: {'[' * 9999}\n---\n"])
def test_a_strange_card_says_nothing(read, card: str) -> None:
    found = read({"README.md": card, "train.jsonl": '{"text": "x"}'}, "dataset")
    assert [dict(one.columns) for one in found] == [{}]


@pytest.mark.parametrize(("split", "wanted"), [
    ("train", ["other.1", "plain", "train-0"]), ("training", ["other.1", "plain", "train-0"]),
    ("test", ["sub/test/0", "x_test"]), ("dev", ["a-dev"]), ("validation", ["a-dev"]), ("other", ["other.1"]),
    ("", ["a-dev", "other.1", "plain", "sub/test/0", "train-0", "x_test"])])
def test_only_the_split_that_is_asked_for_is_read(read, split: str, wanted: list[str]) -> None:
    names = ("plain", "train-0", "x_test", "sub/test/0", "a-dev", "other.1")
    files = {f"{name}.jsonl": json.dumps({"text": name}) for name in names}
    assert [one.text for one in read(files, "dataset", split=split)] == wanted


def test_a_split_that_is_not_there_is_told_and_no_other_one_is_read(read) -> None:
    with pytest.raises(UserError, match="split = 'train'"):
        read({"test-0.jsonl": '{"text": "held out"}'}, "dataset")


def test_a_value_that_python_cannot_hold_costs_no_row(read) -> None:
    table = pa.table({"text": ["a", "b", "c"],
                      "timestamp": pa.array([1, 10**18 + 1, None], pa.timestamp("ns")),
                      "late": pa.array([10**18, 0, 1], pa.timestamp("us")),
                      "zone": pa.array([0, 0, 0], pa.timestamp("us", "No/Where")),
                      "took": pa.array([1, 2, 3], pa.duration("ns"))})
    found = read({"a.parquet": parquet_bytes(table, 3)})
    assert [one.text for one in found] == ["a", "b", "c"]
    assert found[1].columns["date"] == "2001-09-09 01:46:40.000000001"


@pytest.mark.parametrize(("dictionary", "data", "begin"), [
    (4, 60, 4), (None, 60, 60), (0, 60, 60), (None, 10**9, 0), (-5, 60, 0), (None, None, 0)])
def test_every_row_group_begins_somewhere_in_its_file(dictionary, data, begin: int) -> None:
    column = SimpleNamespace(dictionary_page_offset=dictionary, data_page_offset=data)
    assert _begin(SimpleNamespace(column=lambda number: column), 1000) == begin
