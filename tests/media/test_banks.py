"""Banks of raw media: their shapes in manifests, and their records by memory map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_sov.errors import UserError
from megatron_sov.media.banks import PICTURES, SOUNDS, BankShape, open_bank, read_shapes

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
