"""Banks of raw media: their shapes in manifests, and their records by memory map."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.artifacts import manifest_sha256, new_artifact
from megatron_sov.errors import UserError
from megatron_sov.media.banks import PICTURES, SOUNDS, BankShape, open_bank, read_shapes
from megatron_sov.media.data_codecs import CORPUS, codecs_of, refuse_other_codecs
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block, described, read_blocks

SHAPES = {PICTURES: BankShape(PICTURES, (3, 4, 4), 2, (7, 8)),
          SOUNDS: BankShape(SOUNDS, (16, 300), 75, (9,), 16000, 160)}


def test_shapes_are_read_back() -> None:
    record = {kind: shape.record() for kind, shape in SHAPES.items()}
    assert read_shapes(record, "it") == SHAPES and read_shapes(None, "it") == {}


@pytest.mark.parametrize(("change", "words"), [
    ({"shape": [3, 4]}, "3 sizes"), ({"slots": 0}, "no encoder"), ({"dtype": "float64"}, "uint8"),
    ({"shape": [3, 1 << 20, 1 << 20]}, "no encoder"), ({"shape": [1 << 22] * 3}, "no encoder"),
    ({"slots": float("inf")}, "OverflowError"), ({"placeholder_ids": None}, "TypeError")])
def test_a_shape_that_none_has_is_refused(change: dict[str, object], words: str) -> None:
    record = {PICTURES: SHAPES[PICTURES].record() | change}
    with pytest.raises(UserError, match=words):
        read_shapes(record, "source 'a'")


def test_records_are_mapped_and_a_torn_file_is_refused(tmp_path: Path) -> None:
    shape, file = SHAPES[PICTURES], tmp_path / "a.pictures"
    pictures = np.arange(96, dtype=np.uint8).reshape(2, 3, 4, 4)
    file.write_bytes(pictures.tobytes())
    np.testing.assert_array_equal(open_bank(file, shape), pictures)
    file.write_bytes(pictures.tobytes()[:-1])
    with pytest.raises(UserError, match="95 bytes, which are no whole records of 48"):
        open_bank(file, shape)
    file.write_bytes(b"")
    assert open_bank(file, shape).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(("frames", "slots"), [(1, 1), (4, 1), (5, 2), (300, 75), (299, 75)])
def test_a_short_sound_uses_its_share_of_the_slots(frames: int, slots: int) -> None:
    assert SHAPES[SOUNDS].slots_of(frames) == slots


# Codecs of a model's data are found through its shards, and another one is refused by its hash.


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


# Blocks of ids as a tokenizer's manifest has them.


def test_blocks_are_read_back() -> None:
    blocks = [Block(AUDIO, 128606, 6561), Block(IMAGE, 135168, 65536)]
    assert read_blocks(described(blocks), "it") == {b.kind: b for b in blocks}
    assert blocks[1].end == 200704 and read_blocks(None, "it") == {}


def test_a_broken_record_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_blocks({AUDIO: {"first": 1}}, "it")
