"""Units: what they hold, and a look through them that is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from tokenizer.mixture import CountUnit, SourceGroup, look_through, plan


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of two documents of seven bytes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text("\n".join(json.dumps({"text": f"가 {i} {k}"[:6]})
                                                     for k in range(2)))
    return folder


def test_every_file_belongs_to_a_unit_of_its_group(corpus: Path) -> None:
    units = plan([SourceGroup("a", (corpus,)), SourceGroup("b", (corpus / "1.jsonl",))], 1)
    assert [(u.group, u.spans[0].file.name) for u in units] == [(0, "0.jsonl"), (0, "1.jsonl"),
                                                                (0, "2.jsonl"), (1, "1.jsonl")]
    assert [u.group for u in plan([SourceGroup("a", (corpus,))], 1 << 20)] == [0]


def test_a_key_stands_for_file_and_settings(corpus: Path) -> None:
    [unit] = plan([SourceGroup("a", (corpus / "0.jsonl",))], 1)
    key = unit.key({"pattern": "a"})
    assert unit.key({"pattern": "a"}) == key != unit.key({"pattern": "b"})
    (corpus / "0.jsonl").write_text((corpus / "0.jsonl").read_text())
    assert unit.key({"pattern": "a"}) != key
    (corpus / "0.jsonl").unlink()
    with pytest.raises(UserError, match=r"0\.jsonl: cannot be read"):
        unit.key({})


def test_a_look_through_finds_the_sizes_once(corpus: Path, tmp_path: Path) -> None:
    groups = [SourceGroup("g", (corpus,)), SourceGroup("h", (corpus / "0.jsonl",))]
    (tmp_path / "work").mkdir()

    def look(units: list[CountUnit]) -> list[int]:
        told: list[int] = []
        found = look_through(groups, units, tmp_path / "work", 1, told.append)
        assert sum(told) == sum(f.stat().st_size for f in [*corpus.iterdir(), corpus / "0.jsonl"])
        return [n for s in found for n in (s.num_documents, s.num_bytes, int(s.bucket_bytes.sum()))]

    first = look(plan(groups, 1))
    assert first == [6, 42, 42, 2, 14, 14]
    assert look(plan(groups, 1)) == first  # from the file
    (corpus / "0.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"--input h: .*0\.jsonl holds no text"):
        look(plan(groups, 1))
