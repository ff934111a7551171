"""Codecs of a model's data are found through its shards, and another one is refused by its hash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_sov.artifacts import manifest_sha256, new_artifact
from megatron_sov.errors import UserError
from megatron_sov.media.data_codecs import CORPUS, codecs_of, refuse_other_codecs


def artifact(path: Path, kind: str, content: dict[str, object], *inputs: Path) -> Path:
    with new_artifact(path, kind) as made:
        made.content = content
        for one in inputs:
            made.add_input(one)
    return path


def test_a_codec_is_known_by_its_hash_as_long_as_the_data_are_there(tmp_path: Path) -> None:
    one, other = (artifact(tmp_path / name, "codec", {"codec": name}) for name in ("one", "other"))
    corpus = artifact(tmp_path / "corpus", CORPUS, {
        "codecs": {"image": {"manifest_sha256": manifest_sha256(one)}}})
    shards = artifact(tmp_path / "shards", "token_shards", {}, corpus)
    known = codecs_of([shards, tmp_path / "gone"])
    assert known == {"image": {manifest_sha256(one)}}
    refuse_other_codecs({"image": one, "audio": other}, known, "--{kind}-tokenizer")
    with pytest.raises(UserError, match=f"--image-tokenizer .*other: is codec {manifest_sha256(other)[:12]}"):
        refuse_other_codecs({"image": other}, known, "--{kind}-tokenizer")
    shutil.rmtree(corpus)
    assert codecs_of([shards]) == {}
