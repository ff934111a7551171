"""Images and audio in token shards: each placeholder token of a row gets its feature, however documents are
split."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.documents.shard_files import IndexedWriter
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.model.modality import (
    PICTURES, SOUNDS, EncoderInputs, check_encoders, join_inputs, slice_inputs)
from megatron_sov.omni.media.banks import BankShape
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import build_row, join_rows
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.streams import PackedSegment
from megatron_sov.train.data.token_shards import ShardChain
from megatron_sov.train.data.views import DocumentPieces, LongDocuments

IMAGE_PAD, AUDIO_PAD = 5, 6
BANKS = {PICTURES: BankShape(PICTURES, (3, 4, 4), 4, (IMAGE_PAD,)),
         SOUNDS: BankShape(SOUNDS, (2, 8), 2, (AUDIO_PAD,), 16000, 160)}
DOCUMENTS = [  # of (token id, feature index; -1: the token is no placeholder)
    [(10, -1), *[(IMAGE_PAD, 8 + i) for i in range(4)], (11, -1), (AUDIO_PAD, 2), (AUDIO_PAD, 3), (12, -1)],
    [(13, -1), (14, -1), (15, -1)],
    [(16, -1), (AUDIO_PAD, 0), *[(IMAGE_PAD, i) for i in range(4)], *[(IMAGE_PAD, 8 + i) for i in range(4)],
     (17, -1)],
]


def write_shard(prefix: Path, documents: list[list[tuple[int, int]]]) -> None:
    """Write a shard with banks of three images and two sounds; all their values are their index."""
    with IndexedWriter(prefix, "uint16", {"media": "int64"}) as writer:
        for document in documents:
            tokens, features = np.array(document).T
            writer.write(np.array([len(document)]), {"bin": tokens, "media": features})
    np.arange(3, dtype=np.uint8).repeat(3 * 4 * 4).tofile(prefix.with_suffix(".pictures"))
    np.arange(2, dtype=np.float16).repeat(2 * 8).tofile(prefix.with_suffix(".sounds"))


@pytest.fixture
def chain(tmp_path: Path) -> ShardChain:
    """Return the three documents, in two shards."""
    write_shard(tmp_path / "a", DOCUMENTS[:2])
    write_shard(tmp_path / "b", DOCUMENTS[2:])
    return ShardChain([tmp_path / "a", tmp_path / "b"], 32, banks=BANKS)


def list_features(media: EncoderInputs | None) -> list[tuple[int, int]]:
    """Return (position in the row, feature of the bank) of each placeholder.

    The values of a record are its index in the bank (`write_shard`).
    """
    features = []
    for inputs in (media or {}).values():
        for position, feature in zip(inputs.places, inputs.features, strict=True):
            record = int(inputs.records[feature // inputs.slots].flat[0])
            features.append((int(position), record * inputs.slots + int(feature) % inputs.slots))
    return sorted(features)


def concatenate_features(*segments: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Return the expected features of several (document, start, count) spans, concatenated."""
    flat = [pair for document, start, count in segments for pair in DOCUMENTS[document][start:start + count]]
    return [(position, feature) for position, (_, feature) in enumerate(flat) if feature >= 0]


@pytest.mark.parametrize("segments", [
    [(0, 0, 9)], [(1, 0, 3)], [(0, 3, 4), (2, 0, 4)], [(2, 4, 7), (1, 0, 2), (0, 0, 3)]])
def test_a_row_has_the_features_of_its_placeholders(chain: ShardChain, segments: list[Any]) -> None:
    row = build_row(OrderedSample(0, tuple(PackedSegment(*segment) for segment in segments)), chain, 16)
    assert list_features(row.encoder_inputs) == concatenate_features(*segments)
    assert (row.encoder_inputs is None) == (not concatenate_features(*segments))


def test_rows_are_joined_and_cut_with_their_media(chain: ShardChain) -> None:
    rows = [build_row(OrderedSample(0, (PackedSegment(document, 0, count),)), chain, 12)
            for document, count in ((1, 3), (0, 9), (2, 11))]
    joined_row = join_rows(rows)
    expected = [(position + 12, feature) for position, feature in concatenate_features((0, 0, 9))] + [
        (position + 24, feature) for position, feature in concatenate_features((2, 0, 11))]
    assert list_features(joined_row.encoder_inputs) == expected
    slices = [slice_inputs(joined_row.encoder_inputs, start, 7) for start in range(0, 36, 7)]
    assert [feature for number, inputs in enumerate(slices)
            for feature in list_features(join_inputs([(7 * number, inputs)]))] == expected
    assert all(len(inputs.records) <= 3 for media in slices for inputs in media.values())


def test_views_of_a_source_keep_media(chain: ShardChain) -> None:
    assert list_features(DocumentPieces(chain, 4).encoder_inputs(1, 0, 4)) == concatenate_features((0, 4, 4))
    assert list_features(LongDocuments(chain, 9).encoder_inputs(1, 2, 6)) == concatenate_features((2, 2, 6))


@pytest.mark.each(("pair", "message"), [
    ((IMAGE_PAD, -1), "placeholder of pictures for feature -1"),
    ((IMAGE_PAD, 12), "feature 12, and there are 12"),  # 3 images x 4 features
    ((9, 2), "feature 2 at token id 9, which is not a placeholder")])
def test_an_invalid_media_index_is_refused(tmp_path: Path, pair: tuple[int, int], message: str) -> None:
    write_shard(tmp_path / "a", [[(10, -1), pair]])
    with pytest.raises(UserError, match=message):
        ShardChain([tmp_path / "a"], 32, banks=BANKS).encoder_inputs(0, 0, 2)


@pytest.mark.each(("suffix", "size_bytes"), [(".media", 8), (".pictures", 47), (".sounds", None)])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, size_bytes: int | None) -> None:
    write_shard(tmp_path / "a", DOCUMENTS)
    file = (tmp_path / "a").with_suffix(suffix)
    file.unlink()
    if size_bytes is not None:
        file.write_bytes(bytes(size_bytes))
    with pytest.raises(UserError, match=f"a{suffix}"):
        ShardChain([tmp_path / "a"], 32, banks=BANKS)


def test_a_model_reads_only_banks_of_its_encoders() -> None:
    vision = VisionEncoderConfig(kind="siglip", placeholder_ids=(IMAGE_PAD,), image_size=4, patch_size=2)
    audio = AudioEncoderConfig(kind="whisper", placeholder_ids=(AUDIO_PAD,), num_mels=2, num_frames=4)
    plain = recipes.get("tiny-qwen3").model
    source = Source("media", None, "text", {}, {}, 1.0, banks=BANKS)
    check_encoders(dataclasses.replace(plain, vision=vision, audio=dataclasses.replace(audio, num_frames=8)),
                   [dataclasses.replace(source, banks={PICTURES: BANKS[PICTURES]})])
    with pytest.raises(UserError) as e:
        check_encoders(dataclasses.replace(plain, audio=audio), [source])
    assert "no model.vision" in str(e.value) and "[2, 8] with 2 features" in str(e.value)
    with pytest.raises(UserError, match=r"placeholders \[5\]"):
        check_encoders(dataclasses.replace(plain, vision=dataclasses.replace(vision, placeholder_ids=(7,)),
                                           audio=dataclasses.replace(audio, num_frames=8)), [source])
