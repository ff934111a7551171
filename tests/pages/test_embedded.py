"""Small media inside a page: what goes in comes out again, and nothing else is taken for it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from megatron_sov.pages.embedded import MOST_BYTES, address_of, is_picture, is_sound


def test_a_picture_and_a_sound_are_held_whole(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", [0.0, 0.5, -0.5], 16000)
    picture, sound = address_of(tmp_path / "a.png"), address_of(tmp_path / "b.wav")
    assert is_picture(picture) and not is_sound(picture) and is_sound(sound) and not is_picture(sound)
    content = base64.b64decode(picture.partition(",")[2])
    assert Image.open(io.BytesIO(content)).getpixel((2, 1)) == (1, 2, 3)
    assert base64.b64decode(sound.partition(",")[2]) == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize("content", [
    b"", b"<svg onload=alert(1)>", b"RIFF1234AVI ", b"\x89PNG\r\n\x1a\n" * 40_000])
def test_other_files_and_large_ones_are_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert address_of(tmp_path / "a.png") == "" == address_of(tmp_path / "none.png")


@pytest.mark.parametrize("hostile", [
    None, 3, "", "http://example.com/a.png", "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA",
    'data:image/png;base64,AAAA" onerror="x', "data:image/png;base64,AAAA\n",
    "data:image/png;base64," + "A" * (2 * MOST_BYTES)])
def test_only_its_own_addresses_are_shown(hostile: object) -> None:
    assert not is_picture(hostile) and not is_sound(hostile)
