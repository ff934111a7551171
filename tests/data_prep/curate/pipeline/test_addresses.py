"""Addresses follow from values and contents alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.curate.pipeline.addresses import address, mark_of, refuse_changed, tree_hash
from megatron_sov.base.errors import UserError


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


def test_a_file_is_known_by_its_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    mark = mark_of(file)
    refuse_changed(file, mark)
    os.utime(file, ns=(0, mark[1] + 1))
    with pytest.raises(UserError, match="has changed since"):
        refuse_changed(file, mark)
    with pytest.raises(UserError, match="gone: cannot be read"):
        mark_of(tmp_path / "gone")
