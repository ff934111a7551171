"""Data files of tasks: every value keeps its type."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.settings import TaskSources
from megatron_sov.bench.lm.task_rows import TaskFileReader, TaskRows
from megatron_sov.bench.lm.tasks import load_tasks

LOOKS_TYPED = ["1945-08-15", "1446-10-09T00:00:00", "NA", "null", "None", "nan", "007", "1e5", "True", "-",
               "12:30", "1,5", " 7 ", "", "0x1F", "한글"]
"""Texts that the builders of `datasets` and pandas turn into other values."""


def read(file: Path) -> TaskRows:
    rows = TaskFileReader({"test": [str(file)]})()["test"]
    assert isinstance(rows, TaskRows)
    return rows


@pytest.mark.parametrize("text", LOOKS_TYPED)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_text_stays_the_text_that_was_written(tmp_path: Path, suffix: str, text: str) -> None:
    file = tmp_path / f"d{suffix}"
    if suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        quoted = '"' + text + '"'
        file.write_text(f"q{separator}a\nx{separator}{quoted}\ny{separator}{quoted}\n")
        rows = read(file)
    else:
        found = [{"q": "x", "a": text}, {"q": "y", "a": text}]
        lines = "".join(json.dumps(row) + "\n" for row in found)
        file.write_text(lines if suffix == ".jsonl" else json.dumps(found))
        rows = read(file)
    assert list(rows) == [{"q": "x", "a": text}, {"q": "y", "a": text}]
    assert list(rows.features) == ["q", "a"]


def test_values_of_json_keep_their_types_where_rows_differ(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None, "b": {"x": 1}}, {"a": [1], "b": {"y": 2}}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_rows = read(tmp_path / "d.jsonl")
    assert [row["a"] for row in read_rows] == [1, 1.5, "1", None, [1]]
    assert [row["b"] for row in read_rows] == [None, None, None, {"x": 1}, {"y": 2}]
    assert isinstance(read_rows[0]["a"], int)


def test_parquet_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    from datasets import load_dataset

    file = tmp_path / "d.parquet"
    pq.write_table(pa.table({"q": ["a", "b"], "n": [1, 2], "r": [0.5, None]}), file)
    reference = load_dataset("parquet", data_files={"test": str(file)}, split="test",
                             cache_dir=str(tmp_path / "cache"))
    assert list(read(file)) == reference.to_list()


def test_choice_index_in_csv_needs_a_template(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("country,right\nKorea,0\nThailand,1\n")
    text = ("task: t\ndataset_path: csv\ndataset_kwargs: {data_files: {test: d.csv}}\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: '{{country}}'\ndoc_to_choice: [Seoul, Bangkok]\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\ndoc_to_target: ")
    (tmp_path / "t.yaml").write_text(text + "'{{right}}'")
    task = load_tasks(["t"], TaskSources((tmp_path,))).tasks["t"]
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [0, 1]
    (tmp_path / "t.yaml").write_text(text + "right")
    with pytest.raises(UserError, match=r"write '\{\{right\}\}'"):
        load_tasks(["t"], TaskSources((tmp_path,)))


BAD_FILES = [
    ("d.jsonl", '{"a": 1}\n[1]\n', "d.jsonl:2: is a JSON list, must be an object"),
    ("d.json", "[1, 2]", "d.json:1: is a JSON int, must be an object"),
    ("d.json", "[{", "is not valid JSON"),
    ("d.csv", "q,a\nx,1,2\n", "line 2 must have 2 cells, a cell per column"),
    ("d.csv", "q,a\nx\n", "line 2 must have 2 cells"),
    ("d.csv", "q,a,q\nx,1,y\n", "has two columns with the same name (q, a, q)"),
    ("d.csv", 'q,a\n"x,1\n', "is no valid CSV"),
    ("d.csv", b"\xff\xfe\x00", "is no UTF-8 text"),
    ("d.parquet", "no table", "is not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[row[-1][:40] for row in BAD_FILES])
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes,
                                               message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)
