"""`sov-data decontaminate`: refused command lines. test_docs_data.py runs the commands of the page."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main

ITEM = "How many barrels of oil does a refinery with twelve towers fill each morning?"


@pytest.fixture
def files(cwd: Path) -> Path:
    (cwd / "bench.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    (cwd / "text.jsonl").write_text(f'{{"text": "Yes."}}\n{{"text": "He asked: {ITEM}"}}\n')
    (cwd / "text.txt").write_text("Yes.")
    (cwd / "cut.jsonl").write_text('{"text": "Yes."}\n{"text": "cut o')
    (cwd / "odd.jsonl").write_text('{"title": "no question"}\n')
    (cwd / "empty.jsonl").write_text("")
    return cwd


@pytest.mark.parametrize(("options", "message"), [
    ("--input text.jsonl --benchmarks none.jsonl", "none.jsonl: is no file"),
    ("--input text.jsonl --benchmarks odd.jsonl", "odd.jsonl:1: has text in none of the fields question,"),
    ("--input text.jsonl --benchmarks cut.jsonl --fields text", "cut.jsonl:2: is not valid JSON"),
    ("--input text.txt --benchmarks bench.jsonl", "text.txt:1: is not valid JSON"),
    ("--input text.jsonl ./text.jsonl --benchmarks bench.jsonl", "2 files would be written to text.jsonl"),
    ("--input text.jsonl --benchmarks bench.jsonl --text-field body", "has no string field 'body'"),
    ("--input text.jsonl --benchmarks bench.jsonl --min-words 11",
     "--min-words 11: must be at most --ngram = 10"),
])
def test_mistakes_are_one_message_and_write_no_output(files: Path, options: str, message: str,
                                                      get_refusal: Any) -> None:
    assert message in get_refusal("decontaminate", *options.split(), "--output", "out")
    assert not (files / "out").exists()


def test_an_output_is_replaced_only_on_request(files: Path) -> None:
    command = ["decontaminate", "--input", "text.jsonl", "--benchmarks", "bench.jsonl", "--output", "out"]
    assert [main(command), main(command), main([*command, "--overwrite"])] == [0, 2, 0]
    assert (files / "out/text.jsonl").read_text() == '{"text": "Yes."}\n'


@pytest.mark.parametrize("name", ["lines.txt", "lines.ndjson", "lines.jsonl.gz"])
def test_lines_are_read_under_any_ending_and_written_as_jsonl(files: Path, name: str) -> None:
    lines = (files / "text.jsonl").read_bytes()
    (files / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert main(["decontaminate", "--input", name, "--benchmarks", "bench.jsonl", "--output", "out"]) == 0
    assert (files / "out/lines.jsonl").read_text() == '{"text": "Yes."}\n'
