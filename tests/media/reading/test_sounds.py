"""Sounds of all kinds as one channel at one rate."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_sov.documents import BadRecord
from megatron_sov.media.reading.limits import MediaLimits
from megatron_sov.media.reading.sounds import read_sound

LIMITS = MediaLimits(duration_s=3.0)
SECOND = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000) * 0.5


def pitch_hz(samples: np.ndarray, rate_hz: int) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate_hz / len(samples))


@pytest.mark.parametrize(("name", "rate_hz"), [
    ("a.wav", 8_000), ("a.wav", 44_100), ("a.flac", 16_000), ("a.ogg", 48_000), ("a.mp3", 22_050),
    ("a.wav", 11_111)])
def test_any_rate_and_format_keeps_pitch_length_and_loudness(tmp_path: Path, name: str, rate_hz: int) -> None:
    samples = np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz) * 0.5
    soundfile.write(tmp_path / name, samples, rate_hz)
    found, facts = read_sound(tmp_path / name, 16_000, LIMITS)
    assert found.dtype == np.float32 and abs(len(found) - 16_000) <= 1
    assert abs(facts["duration_s"] - 1) < 1e-3
    assert pitch_hz(found, 16_000) == pytest.approx(440, abs=1)
    assert found.std() == pytest.approx(0.3536, rel=0.01)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    many = np.zeros((1600, channels))
    many[:, 0] = 0.5
    soundfile.write(tmp_path / "a.wav", many, 16_000, subtype="FLOAT")
    found, _ = read_sound(tmp_path / "a.wav", 16_000, LIMITS)
    np.testing.assert_allclose(found, 0.5 / channels, rtol=1e-6)


def write_bad(folder: Path) -> None:
    soundfile.write(folder / "silence.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "long.wav", np.zeros(4 * 8_000), 8_000)
    for name, value in (("numbers.wav", np.nan), ("infinite.wav", np.inf), ("loud.wav", 3000.0)):
        samples = np.zeros(100, np.float32)
        samples[7] = value
        soundfile.write(folder / name, samples, 16_000, subtype="FLOAT")
    (folder / "no_sound.wav").write_bytes(b"hello")
    soundfile.write(folder / "a.aiff", np.zeros(100), 16_000)
    # a header that promises ten hours, and a body of a tenth of a second
    soundfile.write(folder / "rate.wav", np.zeros(100), 16_000)
    raw = bytearray((folder / "rate.wav").read_bytes())
    raw[24:28] = struct.pack("<I", 10)
    (folder / "rate.wav").write_bytes(raw)


@pytest.mark.parametrize(("name", "code"), [
    ("silence.wav", "silence"), ("long.wav", "long"), ("numbers.wav", "numbers"), ("infinite.wav", "numbers"),
    ("loud.wav", "numbers"), ("no_sound.wav", "no_sound"), ("a.aiff", "no_sound"), ("rate.wav", "rate"),
    ("gone.wav", "no_sound")])
def test_bad_sounds_are_told_by_what_is_wrong(tmp_path: Path, name: str, code: str) -> None:
    write_bad(tmp_path)
    with pytest.raises(BadRecord) as found:
        read_sound(tmp_path / name, 16_000, LIMITS)
    assert found.value.code == code and str(tmp_path) not in found.value.reason
