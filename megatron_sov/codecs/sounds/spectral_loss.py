"""How far one sound is from another to the ear: logarithmic mel spectra at several resolutions.

The form is that of BigVGAN-v2's training (NVIDIA/BigVGAN, loss.py `MultiScaleMelSpectrogramLoss`, after
descript-audio-codec), with the linear magnitudes beside the mels ("multi-resolution STFT", arXiv 1910.11480).
"""

from __future__ import annotations

import torch
from torch import nn

HOPS_PER_WINDOW = 4
"""Frames that overlap."""


def mel_filters(sample_rate_hz: int, window: int, num_mels: int) -> torch.Tensor:
    """Return [num_mels, window // 2 + 1] triangular filters, equally wide on Slaney's mel scale, of equal
    area (transformers' `mel_filter_bank`); one too narrow for the window's resolution is empty."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(window // 2 + 1, num_mels, 0.0, sample_rate_hz / 2, sample_rate_hz,
                              norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float().T


class SpectralLoss(nn.Module):
    """The mean distance of two batches of sound over all resolutions."""

    def __init__(self, sample_rate_hz: int, windows: tuple[int, ...], num_mels: int,
                 quiet: float = 1e-5) -> None:
        """Args:
            sample_rate_hz: of the sounds.
            windows: samples of each resolution's window.
            num_mels: of the largest window; a smaller window has fewer, in proportion.
            quiet: magnitudes well below it are all silence; a tone of amplitude 1 has window / 4.
        """
        super().__init__()
        self.windows, self.quiet = windows, quiet
        for window in windows:
            mels = max(num_mels * window // max(windows), 4)
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"mels{window}", mel_filters(sample_rate_hz, window, mels), persistent=False)

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the distance of [n, t] samples from [n, t] samples, 0 where they are equal."""
        parts = []
        for window in self.windows:
            of_made, of_real = self._magnitudes(made, window), self._magnitudes(real, window)
            # spectral convergence: what is loud counts as much as it is loud
            parts.append((of_real - of_made).norm() / of_real.norm())
            filters = self.get_buffer(f"mels{window}")
            mels_of_made, mels_of_real = filters @ of_made + self.quiet, filters @ of_real + self.quiet
            parts += [(of_made.log() - of_real.log()).abs().mean(),
                      (mels_of_made.log() - mels_of_real.log()).abs().mean()]
        return torch.stack(parts).sum() / len(self.windows)

    def _magnitudes(self, sound: torch.Tensor, window: int) -> torch.Tensor:
        spectrum = torch.stft(sound, window, window // HOPS_PER_WINDOW, pad_mode="constant",
                              window=self.get_buffer(f"hann{window}"), return_complex=True)
        # never 0, where neither root nor logarithm has a slope
        return (spectrum.real**2 + spectrum.imag**2 + self.quiet**2).sqrt()
