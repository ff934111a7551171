"""Sounds as encoders of the Whisper family hear them: logarithms of mels, in pieces of one length."""

from __future__ import annotations

import numpy as np

SAMPLE_RATE_HZ, HOP_SAMPLES, WINDOW_SAMPLES = 16_000, 160, 400
"""Of the spectrograms that encoders of the Whisper family hear."""


class Spectrograms:
    """Makes pieces of sounds; the numbers are those of transformers' `WhisperFeatureExtractor`."""

    def __init__(self, mels: int, seconds: int) -> None:
        """Take the sizes of a piece; a shorter one is filled up with silence."""
        from transformers import WhisperFeatureExtractor

        self._piece_samples = seconds * SAMPLE_RATE_HZ
        self._extractor = WhisperFeatureExtractor(feature_size=mels, sampling_rate=SAMPLE_RATE_HZ,
                                                  hop_length=HOP_SAMPLES, chunk_length=seconds,
                                                  n_fft=WINDOW_SAMPLES)

    def pieces(self, samples: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return float16 [pieces, mels, frames] of a sound, and how many frames of each are sound."""
        cut = [samples[i:i + self._piece_samples] for i in range(0, len(samples), self._piece_samples)]
        found = self._extractor(cut, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np",
                                padding="max_length")["input_features"]
        return np.asarray(found, np.float16), [-(-len(piece) // HOP_SAMPLES) for piece in cut]
