"""Addresses follow from values and contents alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.pipeline.addresses import address, hashes_of, tree_hash
from megatron_sov.errors import UserError


def test_an_address_is_of_values_and_not_of_their_order() -> None:
    assert address({"a": 1, "b": [1, 2]}) == address({"b": [1, 2], "a": 1}) != address({"a": 1, "b": [2, 1]})


def test_content_counts_and_place_does_not(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "in/x").write_text("same")
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")
    assert tree_hash(tmp_path / "one/in/x") == tree_hash(tmp_path / "two/in/x")
    (tmp_path / "two/in/x").rename(tmp_path / "two/in/y")
    assert tree_hash(tmp_path / "one") != tree_hash(tmp_path / "two")


def test_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_prep.pipeline.addresses as module

    read: list[str] = []
    really = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda file, how: read.append(file.name) or really(file, how))
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
    known = tmp_path / "known/x.json"
    first = hashes_of(files, known)
    os.utime(files[1], (1, 1))
    assert hashes_of(files, known) == first and sorted(read) == ["a", "b", "b", "c"]
    known.write_text("{half")
    assert hashes_of(files, known) == first and len(read) == 7
    with pytest.raises(UserError, match="gone: cannot be read"):
        hashes_of([tmp_path / "gone"])


def test_another_content_with_the_same_size_and_time_is_read(tmp_path: Path) -> None:
    file, known = tmp_path / "a", tmp_path / "known/x.json"
    file.write_text("one")
    before, stat = hashes_of([file], known), file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert hashes_of([file], known) != before
