"""Division of sources into shards, and addresses (hashes of content and settings) of a run's files."""

import errno
import os
from pathlib import Path

import pytest

from data_prep.curate.pipeline import plan as plan_module
from data_prep.curate.pipeline.addresses import check_unchanged, compute_address, hash_tree, read_file_mark
from data_prep.curate.pipeline.plan import split_into_shards
from data_prep.curate.sources.source import SourcePiece
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import link_or_copy


def split_sizes(*sizes: int) -> list[list[int]]:
    """Split pieces of these sizes into shards of at most 100 bytes; return the sizes in each shard."""
    pieces = [SourcePiece("text", f"{number:05}", 0, size, size) for number, size in enumerate(sizes)]
    pieces_by_shard = split_into_shards(pieces, 100)
    assert list(pieces_by_shard) == list(range(len(pieces_by_shard)))
    assert [piece for shard in pieces_by_shard.values() for piece in shard] == pieces
    return [[piece.size_bytes for piece in shard] for shard in pieces_by_shard.values()]


def test_a_shard_ends_before_it_exceeds_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_sizes(40, 60, 1, 500, 0, 99, 2) == [[40, 60], [1], [500], [0, 99], [2]]
    monkeypatch.setattr(plan_module, "MAX_PIECES", 2)
    assert split_sizes(0, 0, 0, 0, 0) == [[0, 0], [0, 0], [0]]


def test_files_are_copied_if_hard_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse_link)
    (tmp_path / "a").write_text("text")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text" and not (tmp_path / "a").samefile(tmp_path / "b")


def test_a_missing_file_is_not_linked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a: is missing; make it again or restore it from a copy"):
        link_or_copy(tmp_path / "a", tmp_path / "b")


def test_an_address_depends_on_values_but_not_on_key_order() -> None:
    assert compute_address({"a": 1, "b": [1, 2]}) == compute_address({"b": [1, 2], "a": 1})
    assert compute_address({"a": 1, "b": [1, 2]}) != compute_address({"a": 1, "b": [2, 1]})


def test_a_tree_hash_depends_on_content_but_not_on_the_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "in/x").write_text("same")
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")
    assert hash_tree(tmp_path / "one/in/x") == hash_tree(tmp_path / "two/in/x")
    (tmp_path / "two/in/x").rename(tmp_path / "two/in/y")
    assert hash_tree(tmp_path / "one") != hash_tree(tmp_path / "two")


def test_a_file_is_identified_by_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    mark = read_file_mark(file)
    check_unchanged(file, mark)
    os.utime(file, ns=(0, mark[1] + 1))
    with pytest.raises(UserError, match="changed while the run"):
        check_unchanged(file, mark)
    with pytest.raises(UserError, match="gone: cannot be read"):
        read_file_mark(tmp_path / "gone")
