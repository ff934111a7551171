"""Records of benchmarks become items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.curate.decontamination.step import FIELDS, DecontaminateSettings, benchmark_files, read_items
from megatron_sov.base.documents.item_search import SearchItem
from megatron_sov.base.errors import UserError


def test_fields_may_hold_strings_lists_objects_and_messages(tmp_path: Path) -> None:
    records = [{"id": 3, "question": {"stem": "Why?", "choices": ["a", "b"]}},
               {"prompt": [{"role": "user", "content": "Say it."}], "text": "  "},
               {"task_id": "x/1", "query": "One", "text": "Two"}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_items([tmp_path], FIELDS) == [
        SearchItem("quiz", "3", "question", "Why?\na\nb"), SearchItem("quiz", "line 2", "prompt", "Say it."),
        SearchItem("quiz", "x/1", "query", "One"), SearchItem("quiz", "x/1", "text", "Two")]
    (tmp_path / "quiz.jsonl").write_text(json.dumps(records[0]))
    (item,) = read_items([tmp_path / "quiz.jsonl"], ["question.stem"])
    assert item == SearchItem("quiz", "3", "question.stem", "Why?")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file, and no folder with \.jsonl files"):
        benchmark_files([tmp_path])
    (tmp_path / "quiz.jsonl").write_text('{"title": "x"}')
    with pytest.raises(UserError, match=r"quiz.jsonl:1: has text in none of the fields question, .*title"):
        read_items([tmp_path], FIELDS)
    (problem,) = DecontaminateSettings(benchmarks=(tmp_path,)).problems()
    assert problem.rule.startswith(f"{tmp_path / 'quiz.jsonl'}:1: has text in none of"), "before a run"
