"""A sound as one channel of float32 at the rate that is asked for, whatever its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.limits import MediaLimits

SOUND_FORMATS = {"WAV": "audio/wav", "WAVEX": "audio/wav", "RF64": "audio/wav", "FLAC": "audio/flac",
           "OGG": "audio/ogg", "MP3": "audio/mpeg"}
"""libsndfile's name of a format -> type of its content."""
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
LEAST_RATE_HZ, MOST_RATE_HZ = 1000, 768_000
MOST_CHANNELS = 64
PEAK = 16.0
"""Samples of floating point lie in -1..1, and a little above it where a sound is loud: far above it they are
numbers of another kind."""
_BLOCK_SAMPLES = 1 << 20


def read_sound(file: Path, rate_hz: int, limits: MediaLimits) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a sound as float32 [samples] at `rate_hz`, the mean of its channels, and what it was.

    Raises:
        BadRecord: it is none, is empty, too long, cut off, or has samples that are no numbers.
    """
    import soundfile

    try:
        with soundfile.SoundFile(file) as sound:
            if sound.format not in SOUND_FORMATS:
                raise BadRecord("no_sound", f"is a sound of format {sound.format}, read are "
                                            f"{', '.join(SOUND_FORMATS)}; convert it")
            samples = _mono(sound, limits)
            own_hz, mime_type = int(sound.samplerate), SOUND_FORMATS[sound.format]
    except soundfile.LibsndfileError as e:
        raise BadRecord("no_sound", f"is no sound that is read ({str(e).rpartition(': ')[2][:120]}); "
                                    "convert it to "
                                    "WAV, FLAC, "
                                    "OGG or MP3, or leave it out") from None
    if not len(samples):
        raise BadRecord("silence", "is a sound of no length; leave it out")
    if not np.isfinite(samples).all():
        raise BadRecord("numbers", "has samples that are no numbers; mend it, or leave it out")
    if (peak := float(np.abs(samples).max())) > PEAK:
        raise BadRecord("numbers", f"has samples up to {peak:g}, which must lie in -1..1; scale it")
    duration_s = len(samples) / own_hz
    found = resampled(samples, own_hz, rate_hz)
    if not len(found):
        raise BadRecord("silence", f"is a sound of {duration_s:g} s, which is less than a sample; leave it "
                                   "out")
    return found, {"duration_s": duration_s, "mime_type": mime_type}


def _mono(sound: Any, limits: MediaLimits) -> np.ndarray:
    """Return the mean of a sound's channels.

    Raises:
        BadRecord: it is too long, or has rates or channels that no sound has.
    """
    if not LEAST_RATE_HZ <= sound.samplerate <= MOST_RATE_HZ or not 0 < sound.channels <= MOST_CHANNELS:
        raise BadRecord("rate", f"has {sound.channels} channels of {sound.samplerate} samples a second, "
                                "which no "
                                f"sound has (1 to {MOST_CHANNELS}, {LEAST_RATE_HZ:,} to {MOST_RATE_HZ:,}); "
                                "convert it")
    most = int(limits.duration_s * sound.samplerate)
    if sound.frames > most:
        raise _too_long(sound.frames / sound.samplerate, limits)
    parts, passed = [], 0
    # what a header says of the length need not be true
    while len(block := sound.read(_BLOCK_SAMPLES // sound.channels, dtype="float32", always_2d=True)):
        passed += len(block)
        if passed > most:
            raise _too_long(passed / sound.samplerate, limits)
        parts.append(block.mean(axis=1))
    if passed < sound.frames and sound.format != "MP3":  # whose header says it about
        raise BadRecord("truncated",
                        f"is cut off: {passed:,} of {sound.frames:,} samples are there; fetch it "
                                     "again, or leave it out")
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _too_long(found_s: float, limits: MediaLimits) -> BadRecord:
    return BadRecord("long", f"lasts {found_s:,.0f} s or longer, at most {limits.duration_s:g} s are read; "
                             "cut it, "
                             "or raise --max-duration")


def resampled(samples: np.ndarray, own_hz: int, rate_hz: int) -> np.ndarray:
    """Return float32 samples at another rate, by scipy's polyphase filter."""
    if own_hz == rate_hz:
        return samples.astype(np.float32, copy=False)
    from scipy.signal import resample_poly

    common = math.gcd(own_hz, rate_hz)
    return np.asarray(resample_poly(samples, rate_hz // common, own_hz // common), np.float32)
