"""Scorers of generated images and speech for `megatron-sov eval media`, independent of our models and their
training data.

Pictures: scikit-learn's classifier (`digits.py`).  English speech: PocketSphinx (`speech.py`).  Korean
speech, for which PocketSphinx has no model: the word whose recordings are nearest by dynamic time warping of
log-mel frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from digits import judge
from PIL import Image
from scipy.signal import resample_poly, stft
from speech import ENGLISH, KOREAN, SAMPLE_RATE_HZ, recognise, say

DIGITS = {ENGLISH: ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
          KOREAN: ("영", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")}
WORDS = {"zero": "영", "one": "하나", "two": "둘", "three": "셋", "four": "넷", "five": "다섯",
         "hello": "안녕", "summer": "여름", "window": "창문", "yellow": "노랑", "lemon": "레몬"}
"""English -> Korean."""
REFERENCES = ((33, 135), (45, 150), (55, 165))
"""Pitch and speed of the Korean recordings that others are compared with; no model hears them."""
_BANDS, _HOP = 26, 160


def pictures(files: Sequence[Path], labels: Sequence[Sequence[str]]) -> list[str]:
    """Return the name, among its labels, of the digit that is seen in each picture."""
    seen = np.stack([np.asarray(Image.open(file).convert("RGB").resize((16, 16)), np.float32) / 255
                     for file in files]).transpose(0, 3, 1, 2)
    return [of[digit] for of, digit in zip(labels, judge(seen).tolist(), strict=True)]


def sounds(files: Sequence[Path], labels: Sequence[Sequence[str]]) -> list[str]:
    """Return the word, among its labels, that is heard in each sound."""
    return [hear(_read(file), tuple(of)) for file, of in zip(files, labels, strict=True)]


def hear(sound: np.ndarray[Any, Any], words: tuple[str, ...]) -> str:
    """Return the word recognized in a sound at 16 kHz, or ""."""
    if words[0].isascii():
        return recognise(sound, words)
    heard = _frames(sound)
    distances = {word: min(_warped(heard, reference) for reference in _references(word)) for word in words}
    return min(distances, key=lambda word: distances[word])


def _read(file: Path) -> np.ndarray[Any, Any]:
    sound, rate_hz = soundfile.read(file, dtype="float32")
    return sound if rate_hz == SAMPLE_RATE_HZ else resample_poly(sound, SAMPLE_RATE_HZ, rate_hz)


@cache
def _references(word: str) -> list[np.ndarray[Any, Any]]:
    return [_frames(say(word, KOREAN, pitch, speed)) for pitch, speed in REFERENCES]


@cache
def _filters() -> np.ndarray[Any, Any]:
    """Return triangles on the mel scale, [bands, 257]."""
    mels = np.linspace(0, 2595 * np.log10(1 + 7600 / 700), _BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    places = np.linspace(0, SAMPLE_RATE_HZ / 2, 257)
    rise = (places - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - places) / (edges[2:] - edges[1:-1])[:, None]
    return np.clip(np.minimum(rise, fall), 0, None)


def _frames(sound: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return cepstra without loudness, silence at the ends left out, each band less its mean."""
    power = np.abs(stft(sound, SAMPLE_RATE_HZ, nperseg=400, noverlap=400 - _HOP, nfft=512)[2]) ** 2
    loud = power.sum(0) > 1e-4 * max(power.sum(0).max(), 1e-12)
    first, last = (int(np.argmax(loud)), len(loud) - int(np.argmax(loud[::-1]))) if loud.any() else (0, 1)
    from scipy.fft import dct

    logs = np.log(_filters() @ power[:, first:last] + 1e-8)
    cepstra = dct(logs, axis=0, norm="ortho")[1:13].T
    return cepstra - cepstra.mean(0)


def _warped(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Return the mean distance along the best alignment."""
    cost = np.linalg.norm(one[:, None] - other[None], axis=-1)
    total = np.full((len(one) + 1, len(other) + 1), np.inf)
    total[0, 0] = 0
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            total[i, j] = cost[i - 1, j - 1] + min(total[i - 1, j], total[i, j - 1], total[i - 1, j - 1])
    return float(total[-1, -1]) / (len(one) + len(other))
