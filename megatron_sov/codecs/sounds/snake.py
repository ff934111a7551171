"""The periodic activation of BigVGAN (arXiv 2206.04658): Snake at twice the rate, between low-pass filters.

The filters and formulas are those of NVIDIA/BigVGAN (activations.py, alias_free_activation/torch).  There,
and in the authors' serving code, each activation looks ahead; here the same filters are late by
`DELAY_SAMPLES` instead, so that nothing depends on what comes later and a stream is exactly the whole.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from megatron_sov.codecs.sounds.causal import Past

RATIO = 2
"""Of the rate between the filters over the rate outside."""
TAPS = 12
"""Of each filter."""
DELAY_SAMPLES = 5
"""By which the output comes later than BigVGAN's: half of what both filters look ahead there."""
_ABOVE_ZERO = 1e-9


def low_pass(cutoff: float, half_width: float, num_taps: int) -> torch.Tensor:
    """Return [num_taps] of a sinc under a Kaiser window, whose sum is 1 (BigVGAN's `kaiser_sinc_filter1d`).

    Args:
        cutoff: in cycles per sample, up to 0.5.
        half_width: of the band in which it falls off, likewise.
        num_taps: an even number.
    """
    attenuation = 2.285 * (num_taps // 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21)**0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    time = torch.arange(num_taps) - (num_taps - 1) / 2
    taps = torch.kaiser_window(num_taps, beta=beta, periodic=False) * torch.sinc(2 * cutoff * time)
    return taps / taps.sum()


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b with a = exp(`alpha`), b = exp(`beta`) of each channel, both 1 at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of [n, channels, t]."""
        return x + torch.sin(x * self.alpha.exp()[:, None])**2 / (self.beta.exp()[:, None] + _ABOVE_ZERO)


class CausalSnake(nn.Module):
    """SnakeBeta at twice the rate, between two low-pass filters over the present and the past."""

    taps: torch.Tensor
    """[TAPS], of both filters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.snake = SnakeBeta(channels)
        self.register_buffer("taps", low_pass(0.5 / RATIO, 0.6 / RATIO, TAPS), persistent=False)

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels, t] of a piece of that shape."""
        channels, length = piece.shape[1:]
        taps = self.taps.expand(channels, 1, -1)
        num_before = TAPS // RATIO - 1
        joined = past.before(self, piece, num_before, repeats=True)
        spread = RATIO * functional.conv_transpose1d(joined, taps, stride=RATIO, groups=channels)
        first = num_before * RATIO
        bent = self.snake(spread[..., first:first + length * RATIO])
        joined = past.before(self.snake, bent, TAPS - RATIO, repeats=True)
        return functional.conv1d(joined, taps, stride=RATIO, groups=channels)
