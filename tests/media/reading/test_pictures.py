"""Pictures of all kinds as red, green and blue in a square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_sov.documents import BadRecord
from megatron_sov.media.reading.limits import MediaLimits
from megatron_sov.media.reading.pictures import Asked, read_picture

LIMITS = MediaLimits(pixels=10_000)


def read(file: Path, animated: str = "refuse") -> np.ndarray:
    return read_picture(file, Asked((4,), animated), LIMITS)[0][0]


def save(folder: Path, picture: Image.Image, name: str = "a.png", **options: object) -> Path:
    picture.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)),
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("LA", (0, 0), (255, 255, 255)), ("P", 0, (0, 0, 0)),
    ("RGBA", (0, 0, 0, 255), (0, 0, 0)), ("I;16", 0xABCD, (0xAB, 0xAB, 0xAB))])
def test_every_mode_becomes_colours_on_white(tmp_path: Path, mode: str, colour: object,
                                             expected: tuple[int, int, int]) -> None:
    pixels = read(save(tmp_path, Image.new(mode, (8, 8), colour)))
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    assert all((pixels[c] == expected[c]).all() for c in range(3))


def test_print_colours_become_screen_colours(tmp_path: Path) -> None:
    pixels = read(save(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg"))
    assert abs(pixels[:, 0, 0].astype(int) - (255, 0, 0)).max() <= 2


def test_a_turned_picture_is_set_upright_and_its_width_told(tmp_path: Path) -> None:
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, :8] = 255  # the left half is white; turned by a quarter it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    (pixels,), facts = read_picture(save(tmp_path, Image.fromarray(lying), exif=exif), Asked((4,)), LIMITS)
    assert (pixels[:, :2] > 200).all() and (pixels[:, 2:] < 55).all()
    assert (facts["width"], facts["height"], facts["mime_type"]) == (8, 16, "image/png")


def test_several_sides_are_given_as_pillow_resizes(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    arrays, _ = read_picture(save(tmp_path, noise), Asked((4, 7)), LIMITS)
    for array, side in zip(arrays, (4, 7), strict=True):
        expected = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(array, expected.transpose(2, 0, 1))


def test_a_photograph_with_a_small_one_behind_it_is_no_animation(tmp_path: Path) -> None:
    large, small = Image.new("RGB", (16, 16), (250, 0, 0)), Image.new("RGB", (8, 8))
    file = save(tmp_path, large, "a.jpg", format="MPO", save_all=True, append_images=[small])
    assert abs(int(read(file)[0, 0, 0]) - 250) <= 3


def bad_files(folder: Path) -> dict[str, Path]:
    whole = save(folder, Image.effect_noise((60, 60), 50), "whole.png").read_bytes()
    for name, content in {"text.png": b"hello", "empty.png": b"", "cut.png": whole[:len(whole) // 2],
                          "svg.svg": b"<svg/>", "eps.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}.items():
        (folder / name).write_bytes(content)
    frames = [Image.new("L", (8, 8), i * 50) for i in range(3)]
    return {"no_picture": folder / "text.png", "truncated": folder / "cut.png",
            "pixels": save(folder, Image.new("1", (101, 100)), "big.png"),
            "animated": save(folder, frames[0], "a.gif", save_all=True, append_images=frames[1:]),
            "depth": save(folder, Image.new("F", (8, 8)), "f.tiff")}


def test_bad_pictures_are_told_by_what_is_wrong(tmp_path: Path) -> None:
    for code, file in bad_files(tmp_path).items():
        with pytest.raises(BadRecord) as found:
            read(file)
        assert found.value.code == code, file
    for name in ("empty.png", "svg.svg", "eps.eps"):  # EPS is a program, and nothing runs it
        with pytest.raises(BadRecord, match="no picture in one of"):
            read(tmp_path / name)
    assert (read(tmp_path / "a.gif", "first") == 0).all()
