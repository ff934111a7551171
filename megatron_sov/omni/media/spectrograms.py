"""Log-mel spectrograms for audio encoders in the Whisper family."""

import numpy as np

SAMPLE_RATE_HZ, HOP_SAMPLES, WINDOW_SAMPLES = 16_000, 160, 400


class SpectrogramExtractor:
    """Computes spectrograms with transformers' `WhisperFeatureExtractor`."""

    def __init__(self, mels: int, seconds: int) -> None:
        """Set the mel band count and the piece length."""
        from transformers import WhisperFeatureExtractor  # slow to import; commands read the constants above

        self._piece_samples = seconds * SAMPLE_RATE_HZ
        self._extractor = WhisperFeatureExtractor(feature_size=mels, sampling_rate=SAMPLE_RATE_HZ,
                                                  hop_length=HOP_SAMPLES, chunk_length=seconds,
                                                  n_fft=WINDOW_SAMPLES)

    def compute_pieces(self, samples: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Cut a sound at `SAMPLE_RATE_HZ` into pieces, the last padded with silence.

        Returns:
            float16 [pieces, mels, frames]; and the number of frames in each piece before padding.
        """
        pieces = [samples[i:i + self._piece_samples] for i in range(0, len(samples), self._piece_samples)]
        features = self._extractor(pieces, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np",
                                   padding="max_length")["input_features"]
        return np.asarray(features, np.float16), [-(-len(piece) // HOP_SAMPLES) for piece in pieces]
