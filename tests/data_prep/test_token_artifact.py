"""An artifact of token shards as its readers see it: sources, splits and shards in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.token_artifact import CONTENT_VERSION, read_tokens_manifest, shards_of
from megatron_sov.artifacts import new_artifact
from megatron_sov.errors import UserError


def source(name: str, train: int, heldout: int) -> dict[str, Any]:
    """Return the record of a source with so many shards of each split."""
    return {"name": name, "splits": {
        split: {"shards": [{"prefix": f"{name}/{split}-{i:05}", "num_tokens": i} for i in range(n)]}
        for split, n in (("heldout", heldout), ("train", train))}}


CONTENT = {"sources": [source("web", 2, 1), source("books", 1, 0)]}


@pytest.mark.parametrize(("chosen", "prefixes"), [
    ({}, ["web/train-00000", "web/train-00001", "web/heldout-00000", "books/train-00000"]),
    ({"source": "web"}, ["web/train-00000", "web/train-00001", "web/heldout-00000"]),
    ({"split": "train"}, ["web/train-00000", "web/train-00001", "books/train-00000"]),
    ({"source": "books", "split": "heldout"}, [])])
def test_shards_come_by_source_then_split_then_number(chosen: dict[str, str], prefixes: list[str]) -> None:
    found = list(shards_of(Path("data"), CONTENT, **chosen))
    assert [shard.prefix for shard in found] == [Path("data") / prefix for prefix in prefixes]
    for shard in found:
        assert shard.prefix.parent.name == shard.source["name"] and shard.prefix.name.startswith(shard.split)
        assert shard.record["num_tokens"] == int(shard.prefix.name[-5:])


def test_an_unknown_source_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--source 'wep': data has no such source \(sources: web, books\)"):
        list(shards_of(Path("data"), CONTENT, source="wep"))


def test_a_shard_opens_its_own_files(tmp_path: Path) -> None:
    (shard,) = shards_of(tmp_path, CONTENT, source="books")
    with pytest.raises(UserError, match="train-00000"):
        shard.open()


@pytest.mark.parametrize("version", [1, CONTENT_VERSION + 1])
def test_another_layout_is_refused(version: int, tmp_path: Path) -> None:
    with new_artifact(tmp_path / "data", "tokens") as artifact:
        artifact.content.update(CONTENT | ({"content_version": version} if version > 1 else {}))
    with pytest.raises(UserError,
                       match=rf"was packed in layout {version}, this version reads layout {CONTENT_VERSION}"):
        read_tokens_manifest(tmp_path / "data")


def test_the_layout_that_is_written_now_is_read(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "data", "tokens") as artifact:
        artifact.content.update(CONTENT | {"content_version": CONTENT_VERSION})
    assert read_tokens_manifest(tmp_path / "data").content["sources"] == CONTENT["sources"]
    with new_artifact(tmp_path / "other", "tokenizer"):
        pass
    with pytest.raises(UserError, match="tokenizer"):
        read_tokens_manifest(tmp_path / "other")
