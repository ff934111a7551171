"""Which files are read, in which order, and in which parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.documents import (
    Document,
    Reading,
    list_files,
    plan_units,
    read_documents,
    read_span,
)


def read(path: Path) -> list[str]:
    return [d.text for d in read_documents(list_files(path))]


def test_a_folder_is_read_recursively_in_sorted_order_and_only_its_text(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/y.txt", ".git/config.txt", "picture.png", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/y.txt", "a/z.py", "b.md"]


@pytest.mark.parametrize("span_bytes", [150, 1000, 2_000_000])
def test_spans_cut_between_lines_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  span_bytes: int) -> None:
    texts = ["a", "b" * 700, *(f"text {i}\n한국어" for i in range(300))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    monkeypatch.setattr("megatron_sov.documents.files.WHOLE_FILE_BYTES", 100)
    [*units] = plan_units([tmp_path / "a.jsonl"], span_bytes)
    assert (len(units) > 10) == (span_bytes <= 1000)
    found = [item for unit in units for span in unit for item in read_span(span, Reading("text"))]
    assert [d.text for d in found if isinstance(d, Document)] == texts and len(found) == len(texts)


def test_small_files_share_a_unit_and_order_is_kept(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("x" * 100)
    units = list(plan_units(list_files(tmp_path), 450))
    assert [len(unit) for unit in units] == [4] * 5
    assert [span.file.name for unit in units for span in unit] == [f"{i:02}.txt" for i in range(20)]
