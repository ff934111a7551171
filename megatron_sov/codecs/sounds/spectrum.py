"""Sound as log-mel frames, and back by Griffin and Lim's search for phases (IEEE TASSP 32, 1984)."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

FLOOR = 1e-5
"""Smallest power of a mel band; silence lies here."""
_GRIFFIN_LIM_STEPS = 32


class LogMel(nn.Module):
    """Log-mel frames of sounds at one rate.

    Args:
        sample_rate_hz: of the sounds.
        hop_samples: samples from frame to frame.
        num_mels: bands.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self, sample_rate_hz: int, hop_samples: int, num_mels: int) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        self.hop_samples = hop_samples
        self.window_samples = 4 * hop_samples
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")  # of bands that no frequency falls into, where there are many
            filters = mel_filter_bank(self.window_samples // 2 + 1, num_mels, 0.0, sample_rate_hz / 2,
                                      sample_rate_hz, norm="slaney", mel_scale="slaney")
            transposed = torch.from_numpy(filters).float().T.contiguous()
            self.register_buffer("filters", transposed, persistent=False)
            self.register_buffer("window", torch.hann_window(self.window_samples), persistent=False)

    def forward(self, sounds: torch.Tensor) -> torch.Tensor:
        """Return [n, mels, samples / hop] frames, natural logarithms, of [n, samples] sounds."""
        power = self._spectra(sounds).abs()[..., :-1] ** 2
        return (self.filters @ power).clamp_min(FLOOR).log()

    def _spectra(self, sounds: torch.Tensor) -> torch.Tensor:
        return torch.stft(sounds, self.window_samples, self.hop_samples, window=self.window, center=True,
                          pad_mode="constant", return_complex=True)

    def sound(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the sounds [n, frames * hop] in -1..1 of [n, mels, frames] log-mel frames; phases begin at
        zero, so that it is a function of them."""
        power = torch.linalg.pinv(self.filters) @ frames.exp()
        size = F.pad(power.clamp_min(0).sqrt(), (0, 1), mode="replicate")
        length = frames.shape[-1] * self.hop_samples
        spectrum = size.to(torch.complex64)
        for _ in range(_GRIFFIN_LIM_STEPS):
            again = self._spectra(self._back(spectrum, length))
            spectrum = size * again / again.abs().clamp_min(1e-8)
        return self._back(spectrum, length).clamp(-1, 1)

    def _back(self, spectrum: torch.Tensor, length: int) -> torch.Tensor:
        return torch.istft(spectrum, self.window_samples, self.hop_samples, window=self.window, length=length)
