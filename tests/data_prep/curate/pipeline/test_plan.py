"""Shards of a source, and files with a second name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.curate.pipeline import plan as plan_module
from data_prep.curate.pipeline.plan import link, shards_of
from data_prep.curate.sources.source import SourcePiece


def shards(*sizes: int) -> list[list[int]]:
    pieces = [SourcePiece("text", f"{number:05}", 0, size, size) for number, size in enumerate(sizes)]
    found = shards_of(pieces, 100)
    assert list(found) == list(range(len(found)))
    assert [piece for group in found.values() for piece in group] == pieces
    return [[piece.size_bytes for piece in group] for group in found.values()]


def test_a_shard_ends_before_it_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shards(40, 60, 1, 500, 0, 99, 2) == [[40, 60], [1], [500], [0, 99], [2]]
    monkeypatch.setattr(plan_module, "MAX_PIECES", 2)
    assert shards(0, 0, 0, 0, 0) == [[0, 0], [0, 0], [0]]


def test_where_a_disk_has_no_second_names_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "a").write_text("text")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text" and not (tmp_path / "a").samefile(tmp_path / "b")
