"""Of a folder of samples only those that were kept are data."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.listing import source_files
from data_prep.sources.source import SourceSettings
from megatron_sov.documents import list_files


def test_what_was_rejected_is_read_by_nobody(tmp_path: Path) -> None:
    for name in ("made/kept.jsonl", "made/rejected.jsonl", "made/candidates/part-0.jsonl",
                 "made/kept-prompt.jsonl", "made/checks/texts/samples/a.jsonl", "web/a.jsonl", "kept.jsonl",
                 "half/candidates/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert list_files(tmp_path / "made") == [tmp_path / "made/kept.jsonl"]
    found = ["half/candidates/a.jsonl", "kept.jsonl", "made/kept.jsonl", "web/a.jsonl"]
    assert [file.relative_to(tmp_path).as_posix() for file in list_files(tmp_path)] == found
    assert list_files(tmp_path / "made/rejected.jsonl"), "who names a file means it"
    source = SourceSettings("made", (".",), tmp_path, "jsonl")
    assert source_files(source, lambda name: name.endswith(".jsonl")) == found
