"""Layers of a sound that never look ahead, and what they remember between two pieces of it.

A sound is [n, channels, t].  Each layer puts in front of a piece what it needs of the pieces before, so a
sound in pieces comes out as the sound in one piece does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

START_GAIN = 0.3
"""Of a convolution at the start: how much of what goes in comes out.  BigVGAN's weights begin with a
deviation of 0.01, about this in its widest layers; narrow ones would be silent for hundreds of steps.
Ours."""


class Past:
    """What the layers still need of what they have seen; a new one is the begin of a sound."""

    def __init__(self) -> None:
        self._tails: dict[nn.Module, torch.Tensor] = {}

    def before(self, layer: nn.Module, piece: torch.Tensor, length: int, repeats: bool) -> torch.Tensor:
        """Return a piece with the `length` samples before it, and remember its own last ones.

        Args:
            layer: who remembers.
            piece: [n, channels, t], t at least 1.
            length: samples, 0 or more.
            repeats: what is before the begin of a sound: its first sample again and again, or silence.
        """
        if length == 0:
            return piece
        tail = self._tails.get(layer)
        if tail is None:
            first = piece[..., :1] if repeats else torch.zeros_like(piece[..., :1])
            tail = first.expand(-1, -1, length)
        joined = torch.cat([tail, piece], 2)
        self._tails[layer] = joined[..., -length:]
        return joined


class CausalConv(nn.Module):
    """A convolution over the present and the past; silence is before the begin."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv1d(channels_in, channels_out, kernel, dilation=dilation)
        nn.init.normal_(convolution.weight, std=START_GAIN / (channels_in * kernel)**0.5)
        self.convolution = weight_norm(convolution)
        self.num_before = (kernel - 1) * dilation

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels_out, t] of [n, channels_in, t]."""
        out: torch.Tensor = self.convolution(past.before(self, piece, self.num_before, repeats=False))
        return out


class CausalUpsampling(nn.Module):
    """A transposed convolution over the present and one sample before it: `rate` samples out of each.

    Kernel 2 * rate, as in every published BigVGAN; the cut at both ends is the authors' (OmniServe,
    `CausalConvTranspose1d`).
    """

    def __init__(self, channels_in: int, channels_out: int, rate: int) -> None:
        super().__init__()
        convolution = nn.ConvTranspose1d(channels_in, channels_out, 2 * rate, stride=rate)
        # each sample out meets two of the kernel's taps
        nn.init.normal_(convolution.weight, std=START_GAIN / (channels_in * 2)**0.5)
        self.convolution = weight_norm(convolution)
        self.rate = rate

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels_out, t * rate] of [n, channels_in, t]."""
        spread: torch.Tensor = self.convolution(past.before(self, piece, 1, repeats=True))
        return spread[..., self.rate:-self.rate]
