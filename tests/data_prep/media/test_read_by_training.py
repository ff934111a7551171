"""Training reads pictures and sounds as `sov-data pack` writes them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.config import VisionEncoderConfig
from megatron_sov.data.media_shards import check_encoders
from megatron_sov.data.order import Sample
from megatron_sov.data.packing import Segment
from megatron_sov.data.rows import sample_row
from megatron_sov.data.token_shards import open_sources
from megatron_sov.errors import UserError
from tests.data_prep.media.chats import Encode
from tests.data_prep.media.test_packing import CHATS, pack


def test_rows_have_the_pictures_and_sounds_of_their_placeholders(encode: Encode, omni: Path,
                                                                 tmp_path: Path) -> None:
    assert encode(CHATS) == 0
    assert pack(omni, tmp_path / "corpus", tmp_path / "shards", "--format", "chat") == 0
    (source,) = open_sources({str(tmp_path / "shards"): 1.0}, sys.maxsize)
    documents, shades, slots = source.shard("train"), [], []
    for document, length in enumerate(documents.lengths):
        row = sample_row(Sample(0, (Segment(document, 0, int(length)),)), documents, int(length))
        assert row.media is not None
        for kind, part in row.media.items():
            ids = source.banks[kind].placeholder_ids
            assert np.flatnonzero(np.isin(row.tokens, ids)).tolist() == part.places.tolist()
            assert not row.weights[part.places[part.places > 0] - 1].any(), "a placeholder is no target"
            if kind == "pictures":
                shades += [int(part.records[n // 3].max()) for n in part.features[::3]]
            else:
                slots += part.features.tolist()
    assert sorted(shades) == [0, 0, 255, 255, 255] and len(slots) == 8
    with pytest.raises(UserError, match=r"no model\.vision"):
        check_encoders(recipes.get("tiny-qwen3").model, [source])
    vision = VisionEncoderConfig("siglip", image_size=8, patch_size=4, placeholder_ids=(1,))
    with pytest.raises(UserError, match="write the data for this encoder again"):
        check_encoders(dataclasses.replace(recipes.get("tiny-qwen3").model, vision=vision), [source])
