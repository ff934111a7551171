"""Decoders of picture, sound and video files: the arrays they return, and error codes of bad files."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.decoders import read_picture, read_sound, read_video
from megatron_sov.omni.media.reading.limits import MediaLimits, PictureRequest, VideoSampling

LIMITS = MediaLimits(pixels=10_000)


def read(file: Path, animated: str = "refuse") -> np.ndarray:
    """Return the pixels of a picture, resized to 4 x 4: uint8 [3, 4, 4]."""
    return read_picture(file, PictureRequest((4,), animated), LIMITS)[0][0]


def save(folder: Path, picture: Image.Image, name: str = "a.png", **options: object) -> Path:
    picture.save(folder / name, **options)
    return folder / name


@pytest.mark.each(("mode", "colour", "expected"), [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)),
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("LA", (0, 0), (255, 255, 255)), ("P", 0, (0, 0, 0)),
    ("RGBA", (0, 0, 0, 255), (0, 0, 0)), ("I;16", 0xABCD, (0xAB, 0xAB, 0xAB))])
def test_pixel_modes_become_rgb_on_white(tmp_path: Path, mode: str, colour: object,
                                         expected: tuple[int, int, int]) -> None:
    pixels = read(save(tmp_path, Image.new(mode, (8, 8), colour)))
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    assert all((pixels[c] == expected[c]).all() for c in range(3))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    pixels = read(save(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg"))
    assert abs(pixels[:, 0, 0].astype(int) - (255, 0, 0)).max() <= 2


def test_exif_rotation_is_applied_before_measuring(tmp_path: Path) -> None:
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, :8] = 255  # the left half is white; rotated by 90 degrees, it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    (pixels,), facts = read_picture(save(tmp_path, Image.fromarray(lying), exif=exif), PictureRequest((4,)),
                                    LIMITS)
    assert (pixels[:, :2] > 200).all() and (pixels[:, 2:] < 55).all()
    assert (facts["width"], facts["height"], facts["mime_type"]) == (8, 16, "image/png")


def test_each_side_equals_a_bicubic_resize(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    arrays, _ = read_picture(save(tmp_path, noise), PictureRequest((4, 7)), LIMITS)
    for array, side in zip(arrays, (4, 7), strict=True):
        expected = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(array, expected.transpose(2, 0, 1))


def test_mpo_is_not_an_animation(tmp_path: Path) -> None:
    large, small = Image.new("RGB", (16, 16), (250, 0, 0)), Image.new("RGB", (8, 8))
    file = save(tmp_path, large, "a.jpg", format="MPO", save_all=True, append_images=[small])
    assert abs(int(read(file)[0, 0, 0]) - 250) <= 3


def write_bad_pictures(folder: Path) -> dict[str, Path]:
    """Write pictures that are refused; return the file for each error code."""
    whole = save(folder, Image.effect_noise((60, 60), 50), "whole.png").read_bytes()
    for name, content in {"text.png": b"hello", "empty.png": b"", "cut.png": whole[:len(whole) // 2],
                          "svg.svg": b"<svg/>", "eps.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}.items():
        (folder / name).write_bytes(content)
    frames = [Image.new("L", (8, 8), i * 50) for i in range(3)]
    return {"no_picture": folder / "text.png", "truncated": folder / "cut.png",
            "pixels": save(folder, Image.new("1", (101, 100)), "big.png"),
            "animated": save(folder, frames[0], "a.gif", save_all=True, append_images=frames[1:]),
            "depth": save(folder, Image.new("F", (8, 8)), "f.tiff")}


def test_bad_pictures_are_reported_by_code(tmp_path: Path) -> None:
    for code, file in write_bad_pictures(tmp_path).items():
        with pytest.raises(BadRecord) as error:
            read(file)
        assert error.value.code == code, file
    for name in ("empty.png", "svg.svg", "eps.eps"):  # EPS is a program and must not run
        with pytest.raises(BadRecord, match="not a picture in one of"):
            read(tmp_path / name)
    assert (read(tmp_path / "a.gif", "first") == 0).all()


SOUND_LIMITS = MediaLimits(duration_s=3.0)
TONE = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000) * 0.5
"""One second of 440 Hz at 48 kHz."""


@pytest.mark.each(("name", "rate_hz"), [
    ("a.wav", 8_000), ("a.wav", 44_100), ("a.flac", 16_000), ("a.ogg", 48_000), ("a.mp3", 22_050),
    ("a.wav", 11_111)])
def test_resampling_keeps_pitch_length_and_loudness(tmp_path: Path, name: str, rate_hz: int) -> None:
    samples = np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz) * 0.5
    soundfile.write(tmp_path / name, samples, rate_hz)
    found, facts = read_sound(tmp_path / name, 16_000, SOUND_LIMITS)
    assert found.dtype == np.float32 and abs(len(found) - 16_000) <= 1
    assert abs(facts["duration_s"] - 1) < 1e-3
    pitch_hz = np.abs(np.fft.rfft(found)).argmax() * 16_000 / len(found)
    assert pitch_hz == pytest.approx(440, abs=1)
    assert found.std() == pytest.approx(0.5 / np.sqrt(2), rel=0.01)  # of a sine with amplitude 0.5


@pytest.mark.each("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    samples = np.zeros((1600, channels))
    samples[:, 0] = 0.5
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    found, _ = read_sound(tmp_path / "a.wav", 16_000, SOUND_LIMITS)
    np.testing.assert_allclose(found, 0.5 / channels, rtol=1e-6)


@pytest.mark.each("file_format", ["WAV", "WAVEX", "RF64"])
@pytest.mark.each("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.each("share", [0.3, 0.9, 0.9999])
def test_truncated_wav_is_refused(tmp_path: Path, file_format: str, subtype: str, share: float) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 48_000, format=file_format, subtype=subtype)
    whole = (tmp_path / "a.wav").read_bytes()
    assert read_sound(tmp_path / "a.wav", 16_000, SOUND_LIMITS)[1]["duration_s"] == pytest.approx(1)
    (tmp_path / "a.wav").write_bytes(whole[:int(len(whole) * share)])
    with pytest.raises(BadRecord, match="is cut off") as error:
        read_sound(tmp_path / "a.wav", 16_000, SOUND_LIMITS)
    assert error.value.code == "truncated"


@pytest.mark.each("variant", ["chunk after the data", "chunk before the data", "written into a pipe"])
def test_wav_variants_are_read_completely(tmp_path: Path, variant: str) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 48_000, subtype="PCM_16")
    whole = bytearray((tmp_path / "a.wav").read_bytes())
    data_start = whole.index(b"data")
    if variant == "chunk after the data":
        whole += b"note" + (3).to_bytes(4, "little") + b"abc\0"
    elif variant == "chunk before the data":
        whole[data_start:data_start] = b"bext" + (5).to_bytes(4, "little") + b"abcde\0"
    else:  # the lengths of file and data are unknown
        whole[4:8] = whole[data_start + 4:data_start + 8] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(whole)
    assert read_sound(tmp_path / "a.wav", 16_000, SOUND_LIMITS)[1]["duration_s"] == pytest.approx(1)


def write_bad_sounds(folder: Path) -> None:
    """Write sound files that are refused."""
    soundfile.write(folder / "silence.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "long.wav", np.zeros(4 * 8_000), 8_000)
    for name, value in (("numbers.wav", np.nan), ("infinite.wav", np.inf), ("loud.wav", 3000.0)):
        samples = np.zeros(100, np.float32)
        samples[7] = value
        soundfile.write(folder / name, samples, 16_000, subtype="FLOAT")
    (folder / "no_sound.wav").write_bytes(b"hello")
    soundfile.write(folder / "a.aiff", np.zeros(100), 16_000)
    # an implausible sample rate
    soundfile.write(folder / "rate.wav", np.zeros(100), 16_000)
    raw = bytearray((folder / "rate.wav").read_bytes())
    raw[24:28] = struct.pack("<I", 10)  # the field of the sample rate, in Hz
    (folder / "rate.wav").write_bytes(raw)


@pytest.mark.each(("name", "code"), [
    ("silence.wav", "silence"), ("long.wav", "long"), ("numbers.wav", "numbers"), ("infinite.wav", "numbers"),
    ("loud.wav", "numbers"), ("no_sound.wav", "no_sound"), ("a.aiff", "no_sound"), ("rate.wav", "rate"),
    ("gone.wav", "no_sound")])
def test_bad_sounds_are_reported_by_code(tmp_path: Path, name: str, code: str) -> None:
    write_bad_sounds(tmp_path)
    with pytest.raises(BadRecord) as error:
        read_sound(tmp_path / name, 16_000, SOUND_LIMITS)
    assert error.value.code == code and str(tmp_path) not in error.value.reason


VIDEO_LIMITS = MediaLimits(duration_s=60.0)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_is_sampled_at_midpoints(tmp_path: Path, suffix: str) -> None:
    """Frames last 1, 1, 1 and 3 s; samples are at 1, 3 and 5 s."""
    frames = [Image.new("RGB", (8, 8), (40 * i,) * 3) for i in range(4)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:],
                   duration=[1000, 1000, 1000, 3000], lossless=True)
    (found,), facts = read_video(tmp_path / f"a{suffix}", VideoSampling(4, max_frames=3), VIDEO_LIMITS)
    assert found.shape == (3, 3, 4, 4) and found[:, 0, 0, 0].tolist() == [40, 120, 120]
    assert facts["duration_s"] == pytest.approx(6.0)
