"""Recognizers of digits and spoken words, which score generated media in `megatron-sov eval media`.

They are independent of our models and their training data: scikit-learn's classifier for pictures
(`digits.py`), PocketSphinx for English speech (`speech.py`). PocketSphinx has no Korean model; a Korean sound
is the word whose reference recordings are nearest by dynamic time warping of mel cepstra.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from digits import classify_digits
from PIL import Image
from scipy.signal import resample_poly, stft
from speech import ENGLISH, KOREAN, SAMPLE_RATE_HZ, recognize_english, synthesize_speech

DIGITS = {ENGLISH: ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
          KOREAN: ("영", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")}
WORDS = {"zero": "영", "one": "하나", "two": "둘", "three": "셋", "four": "넷", "five": "다섯",
         "hello": "안녕", "summer": "여름", "window": "창문", "yellow": "노랑", "lemon": "레몬"}
"""English word -> Korean word. PocketSphinx distinguishes these English words, but confuses six to nine."""
REFERENCES = ((33, 135), (45, 150), (55, 165))
"""(pitch, words per minute) of the Korean reference recordings, which are not in the training data."""
_BANDS, _HOP = 26, 160


def pictures(files: Sequence[Path], labels: Sequence[Sequence[str]]) -> list[str]:
    """Return the label of the digit in each picture; a picture's labels are the names of the ten digits."""
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((16, 16)), np.float32) / 255
              for file in files]
    digits = classify_digits(np.stack(pixels).transpose(0, 3, 1, 2)).tolist()
    return [names[digit] for names, digit in zip(labels, digits, strict=True)]


def sounds(files: Sequence[Path], labels: Sequence[Sequence[str]]) -> list[str]:
    """Return the label that is recognized in each sound."""
    return [recognize_word(_read(file), tuple(words)) for file, words in zip(files, labels, strict=True)]


def recognize_word(sound: np.ndarray[Any, Any], words: tuple[str, ...]) -> str:
    """Return the word recognized in a sound at 16 kHz, or ""."""
    if words[0].isascii():
        return recognize_english(sound, words)
    cepstra = compute_cepstra(sound)
    distances = {word: min(compute_warped_distance(cepstra, reference)
                           for reference in compute_references(word)) for word in words}
    return min(distances, key=lambda word: distances[word])


def _read(file: Path) -> np.ndarray[Any, Any]:
    sound, rate_hz = soundfile.read(file, dtype="float32")
    return sound if rate_hz == SAMPLE_RATE_HZ else resample_poly(sound, SAMPLE_RATE_HZ, rate_hz)


@cache
def compute_references(word: str) -> list[np.ndarray[Any, Any]]:
    """Return the cepstra of a Korean word's reference recordings."""
    return [compute_cepstra(synthesize_speech(word, KOREAN, pitch, speed)) for pitch, speed in REFERENCES]


@cache
def build_mel_filters() -> np.ndarray[Any, Any]:
    """Return triangular filters on the mel scale, (bands, 257 frequencies)."""
    mels = np.linspace(0, 2595 * np.log10(1 + 7600 / 700), _BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = np.linspace(0, SAMPLE_RATE_HZ / 2, 257)
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return np.clip(np.minimum(rise, fall), 0, None)


def compute_cepstra(sound: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return mel cepstra (frames, 12) without the loudness coefficient and without silence at the ends.

    The mean of each coefficient is subtracted (cepstral mean normalization).
    """
    power = np.abs(stft(sound, SAMPLE_RATE_HZ, nperseg=400, noverlap=400 - _HOP, nfft=512)[2]) ** 2
    loud = power.sum(0) > 1e-4 * max(power.sum(0).max(), 1e-12)
    first, last = (int(np.argmax(loud)), len(loud) - int(np.argmax(loud[::-1]))) if loud.any() else (0, 1)
    from scipy.fft import dct

    logs = np.log(build_mel_filters() @ power[:, first:last] + 1e-8)
    cepstra = dct(logs, axis=0, norm="ortho")[1:13].T
    return cepstra - cepstra.mean(0)


def compute_warped_distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the cost of the best alignment of two cepstra (dynamic time warping), per frame of both."""
    cost = np.linalg.norm(a[:, None] - b[None], axis=-1)
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            total[i, j] = cost[i - 1, j - 1] + min(total[i - 1, j], total[i, j - 1], total[i - 1, j - 1])
    return float(total[-1, -1]) / (len(a) + len(b))
